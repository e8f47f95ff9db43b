"""Rows as FP8 dispatch sends them: E4M3 in tiles of 128 with power-of-two scales (arXiv 2412.19437, section 3.3.3).

Rounding a row that is on such tiles again changes nothing: the largest code of a tile is at least 224 of 448, so that
the scale stays or halves, and twice a code is a code. So rows are rounded once, before dispatch and with one rank too,
and writing them as bytes loses nothing.

Shape legend: R rows, D values each, B = D + ceil(D / 128) bytes.
"""

from typing import Any

import torch

from moe.fp8.quantise import E4M3, TILE, Block, Grid, codes_and_scales, rounded
from moe.fp8.tally import Tally

DISPATCHED = Grid(Block(1, TILE), E4M3, "power_of_two")


class _Round(torch.autograd.Function):
    """Rounding whose gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tally: Tally) -> torch.Tensor:
        values, counts = rounded(x, DISPATCHED, count=True)
        if counts is not None:
            tally.add("activations", counts)
        return values.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class Fp8Rows:
    """``moe.layers.dispatch.RowCodec`` of one byte a value and one byte a tile."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def round(self, x_RD: torch.Tensor) -> torch.Tensor:
        """The rows that will arrive, in the dtype of ``x`` (exact in bf16: 4 bits of mantissa)."""
        y: torch.Tensor = _Round.apply(x_RD, self._tally)
        return y

    def encode(self, x_RD: torch.Tensor) -> torch.Tensor:
        """Rounded rows -> uint8 [R, B]: E4M3 codes, then each tile's scale as its biased exponent, 255 for NaN."""
        codes_RD, scales_RD = codes_and_scales(x_RD, DISPATCHED)
        exponents = (scales_RD[:, ::TILE].contiguous().view(torch.int32) >> 23).to(torch.uint8)
        return torch.cat((codes_RD.to(E4M3.dtype).view(torch.uint8), exponents), dim=1)

    def decode(self, bytes_RB: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        """The rows [R, width] that ``encode`` was given."""
        codes_RD, exponents = bytes_RB[:, :width], bytes_RB[:, width:]
        scales = (exponents.to(torch.int32) << 23).view(torch.float32).repeat_interleave(TILE, dim=1)[:, :width]
        return codes_RD.contiguous().view(E4M3.dtype).float().mul_(scales).to(dtype)
