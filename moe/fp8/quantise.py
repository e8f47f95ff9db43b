"""Rounding to FP8 with a scale for each block of a matrix.

A block's scale is its largest magnitude over the format's largest number, so that nothing is clipped. A block of zeros
has the scale 1. A block with an infinity or NaN becomes NaN throughout: clamping it would hide it from the check that
refuses such a step. Scales are never below 2^-117, since among subnormal numbers a ratio may exceed the format; values
in blocks below 2^-109 lose bits by that.

Shape legend: R rows, C columns; leading dimensions are matrices of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

TILE = 128
"""Values that share a scale, along one dimension or both."""

_MIN_SCALE = 2.0**-117


@dataclass(frozen=True)
class Format:
    """An 8-bit float. Its largest number is 1.75 times a power of two."""

    dtype: torch.dtype
    max: float
    mantissa_bits: int
    min_exponent: int
    """Of normal numbers."""
    max_exponent: int


E4M3 = Format(torch.float8_e4m3fn, 448.0, 3, -6, 8)
E5M2 = Format(torch.float8_e5m2, 57344.0, 2, -14, 15)


class Block(NamedTuple):
    """Rows and columns that share a scale; None for all there are. Those at the end may be smaller."""

    rows: int | None
    columns: int | None


@dataclass(frozen=True)
class Grid:
    """The numbers that a matrix is rounded to."""

    block: Block
    format: Format = E4M3
    scales: Literal["fp32", "power_of_two"] = "fp32"


class Counts(NamedTuple):
    """Of a rounded matrix, as fp64 scalars: how many values, nonzero ones that became 0, and ones at +-max."""

    values: torch.Tensor
    underflown: torch.Tensor
    saturated: torch.Tensor


def round_to(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Nearest numbers of the format, ties to even, as fp32; ``x`` fp32 of at most the format's maximum or not finite.

    The same as a cast to the format and back but for the sign of a zero, in a fifth of the time on a CPU: a sum with a
    power of two rounds at the last bit that the format keeps. (1.5 times it, so that a negative x stays in range.)
    """
    shift = 23 - fmt.mantissa_bits
    large = x.view(torch.int32) & 0x7F800000
    large.clamp_(min=(127 + fmt.min_exponent) << 23).add_((shift << 23) | 0x400000)
    large_f = large.view(torch.float32)
    return (x + large_f).sub_(large_f)


def scale_of(amax: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Scale of blocks whose largest magnitude is ``amax``, fp32; not finite where that is not.

    Zero times infinity is NaN, so such a block's values are NaN whichever of the two its scale is.
    """
    if grid.scales == "power_of_two":
        # The least power of two that amax / max does not exceed: the exponent goes up past a mantissa of 1.75.
        exponent = ((amax.view(torch.int32) + 0x1FFFFF) >> 23) - grid.format.max_exponent
        scale = (exponent.clamp_(min=1) << 23).view(torch.float32)
        scale += amax * 0  # NaN where amax is not finite, whose bits look like a number's here
    else:
        scale = amax / grid.format.max
    return scale.clamp_(min=_MIN_SCALE).masked_fill_(amax == 0, 1.0)


def rounded(x: torch.Tensor, grid: Grid, *, count: bool = False) -> tuple[torch.Tensor, Counts | None]:
    """``x`` [..., R, C] rounded to the grid, in fp32 with scales multiplied in, and counts if asked for."""
    wide = x.float()
    out = torch.empty_like(wide, memory_format=torch.contiguous_format)
    counts = []
    for part, part_out in zip(_regular_parts(wide, grid.block), _regular_parts(out, grid.block), strict=True):
        codes, scale = _codes(part, grid)
        torch.mul(codes, scale, out=part_out)
        if count:
            counts.append(_count(part, codes, grid.format))
    if not count:
        return out, None
    zeros = [wide.new_zeros((), dtype=torch.float64)] * 3
    return out, Counts(*(torch.stack(column).sum() for column in zip(zeros, *counts, strict=True)))


def codes_and_scales(x: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [..., R, C] as numbers of the format and, for every one of them, its scale; both fp32 [..., R, C]."""
    wide = x.float()
    codes, scales = (torch.empty_like(wide, memory_format=torch.contiguous_format) for _ in range(2))
    parts = (_regular_parts(tensor, grid.block) for tensor in (wide, codes, scales))
    for part, part_codes, part_scales in zip(*parts, strict=True):
        found, scale = _codes(part, grid)
        part_codes.copy_(found)
        part_scales.copy_(scale.expand_as(part))
    return codes, scales


def _codes(part: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    scale = scale_of(part.abs().amax(dim=(-3, -1), keepdim=True), grid)
    return round_to(part / scale, grid.format), scale


def _regular_parts(x: torch.Tensor, block: Block) -> Iterator[torch.Tensor]:
    """Views [..., row blocks, rows, column blocks, columns] of ``x`` [..., R, C] that together are all of it."""
    for rows, row_size in _cuts(x.shape[-2], block.rows):
        for columns, column_size in _cuts(x.shape[-1], block.columns):
            yield x[..., rows, columns].unflatten(-1, (-1, column_size)).unflatten(-3, (-1, row_size))


def _cuts(length: int, size: int | None) -> Iterator[tuple[slice, int]]:
    """All whole blocks, then the rest."""
    size = min(length, size or length)
    rest = length % size if size else 0
    if length - rest:
        yield slice(0, length - rest), size
    if rest:
        yield slice(length - rest, length), rest


def _count(part: torch.Tensor, codes: torch.Tensor, fmt: Format) -> Counts:
    """Flags are fp32, whose sums are exact up to 2^24 and several times faster than those of booleans."""
    flags = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)

    def number() -> torch.Tensor:
        return torch.stack([some.sum() for some in flags.view(-1).split(1 << 24)]).sum(dtype=torch.float64)

    torch.ne(part, 0, out=flags)
    nonzero = number()
    torch.ne(codes, 0, out=flags)
    underflown = nonzero - number()
    torch.ge(torch.abs(codes, out=flags), fmt.max, out=flags)
    return Counts(nonzero.new_tensor(float(codes.numel())), underflown, number())
