"""The three products of a weight with FP8 operands (DeepSeek-V3, arXiv 2412.19437, section 3.3).

Each operand is rounded for the product that it goes into: 128 values along the summed dimension share a scale, so an
activation is rounded once along its channels (forward) and once along the tokens of its expert (weight gradient), a
gradient likewise. A weight's blocks of 128 x 128 serve both products that it is in.

Tokens of one rank and micro-batch are what a weight gradient's tiles run along. Other divisions have other tiles, and
agree as closely as FP8 rounds, not to fp32's last bits.

Shape legend: P rows sorted by expert, E experts on this rank, X and Y the two widths of a weight; dense layers have one
expert. M and N outputs, K summed over.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from moe.config.fp8 import DeepseekV3Fp8Config
from moe.fp8.accumulate import limited_product, promoted_product
from moe.fp8.quantise import E4M3, E5M2, TILE, Block, Grid, codes_and_scales, rounded
from moe.fp8.tally import Operand, Tally
from moe.layers.grouped import groups


@dataclass(frozen=True)
class _Rounded:
    """A rounded operand: values with scales multiplied in, or, with ``scales``, apart from them."""

    values: torch.Tensor
    scales: torch.Tensor | None = None

    def __getitem__(self, index: int | slice) -> "_Rounded":
        return _Rounded(self.values[index], None if self.scales is None else self.scales[index])

    def t(self) -> "_Rounded":
        """Rows and columns exchanged."""
        return _Rounded(self.values.t(), None if self.scales is None else self.scales.t())


class Fp8Products:
    """``moe.layers.grouped.Products`` in FP8. Sums are fp32, then in the dtype of the rows; weight gradients stay fp32.

    ``copies`` ranks hold the same weights. ``dispatched`` says that activations come already rounded in tiles with
    power-of-two scales, as FP8 dispatch delivers them: the forward rounds them no further (it could not: they are on
    their tiles' grids), and the weight gradient takes power-of-two scales for them as well (section 3.3.3).
    """

    def __init__(self, config: DeepseekV3Fp8Config, tally: Tally, copies: int = 1, *, dispatched: bool = False) -> None:
        tiles = config.scaling == "tiles"
        self._along_columns = Block(1, TILE) if tiles else Block(None, None)
        self._along_rows = Block(TILE, 1) if tiles else Block(None, None)
        self._weights = Grid(Block(TILE, TILE) if tiles else Block(None, None), E4M3, config.scales)
        self._activations = Grid(self._along_columns, E4M3, "power_of_two" if dispatched else config.scales)
        gradient_format = E4M3 if config.gradients == "e4m3" else E5M2
        self._gradients = Grid(self._along_columns, gradient_format, config.scales)
        self._accumulation = config.accumulation
        self._tally, self._copies, self._dispatched = tally, copies, dispatched

    def forward(self, a_PX: torch.Tensor, w_EYX: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
        """``a W_e^T`` for each expert's rows -> [P, Y], in the dtype of ``a``."""
        count: Operand | None = None if self._dispatched else "activations"
        a, w = self._round(a_PX, self._activations, count), self._round(w_EYX, self._weights, "weights")
        out_PY = a.values.new_empty(a_PX.shape[0], w_EYX.shape[1])
        for expert, rows in groups(ends):
            self._multiply(a[rows], w[expert], out_PY[rows])
        return out_PY.to(a_PX.dtype)

    def input_gradient(self, g_PY: torch.Tensor, w_EYX: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
        """``g W_e`` for each expert's rows -> [P, X], in the dtype of ``g``."""
        g, w = self._round(g_PY, self._gradients, "gradients"), self._round(w_EYX, self._weights)
        out_PX = g.values.new_empty(g_PY.shape[0], w_EYX.shape[2])
        for expert, rows in groups(ends):
            self._multiply(g[rows], w[expert].t(), out_PX[rows])
        return out_PX.to(g_PY.dtype)

    def weight_gradient(self, g_PY: torch.Tensor, a_PX: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
        """``g^T a`` over each expert's rows -> fp32 [E, Y, X]; exactly zero for an expert without rows."""
        out_EYX = torch.zeros(len(ends), g_PY.shape[1], a_PX.shape[1], device=g_PY.device)
        begins = _tile_begins(ends)
        g = self._round(_at_tiles(g_PY, ends, begins), replace(self._gradients, block=self._along_rows))
        a = self._round(_at_tiles(a_PX, ends, begins), replace(self._activations, block=self._along_rows))
        for expert, rows in groups(ends):
            at_tiles = slice(begins[expert], begins[expert] + rows.stop - rows.start)
            self._multiply(g[at_tiles].t(), a[at_tiles].t(), out_EYX[expert])
        return out_EYX

    def _round(self, x: torch.Tensor, grid: Grid, count: Operand | None = None) -> _Rounded:
        if count is None and self._accumulation == "promoted":
            return _Rounded(*codes_and_scales(x, grid))
        values, counts = rounded(x, grid, count=count is not None)
        if count is not None and counts is not None:
            self._tally.add(count, counts, self._copies if count == "weights" else 1)
        return _Rounded(values) if self._accumulation != "promoted" else _Rounded(*codes_and_scales(x, grid))

    def _multiply(self, a: _Rounded, b: _Rounded, out_MN: torch.Tensor) -> None:
        """``a b^T`` of [M, K] and [N, K] into ``out_MN``."""
        if a.scales is not None and b.scales is not None:
            out_MN.copy_(promoted_product(a.values, a.scales, b.values, b.scales, TILE))
        elif self._accumulation == "unpromoted":
            out_MN.copy_(limited_product(a.values, b.values))
        else:
            torch.mm(a.values, b.values.t(), out=out_MN)


def _tile_begins(ends: Sequence[int]) -> list[int]:
    """Where each expert's rows begin if each begins a tile, and where the last tile ends."""
    begins = [0]
    for start, end in zip((0, *ends), ends, strict=False):
        begins.append(begins[-1] + -(-(end - start) // TILE) * TILE)
    return begins


def _at_tiles(x_PX: torch.Tensor, ends: Sequence[int], begins: Sequence[int]) -> torch.Tensor:
    """Rows spread so that each expert's begin a tile, zeros between: all tiles are then rounded at once.

    Zeros change no scale. One expert alone begins at 0 anyway.
    """
    if len(ends) == 1:
        return x_PX
    spread = x_PX.new_zeros(begins[-1], x_PX.shape[1])
    for expert, rows in groups(ends):
        spread[begins[expert] : begins[expert] + rows.stop - rows.start] = x_PX[rows]
    return spread
