"""Rounding to FP8 is that of the formats' definition, block by block, and hides nothing."""

import math
from typing import Literal

import pytest
import torch

from moe.fp8.quantise import E4M3, E5M2, Block, Format, Grid, codes_and_scales, round_to, rounded
from tests.moe.fp8 import plain

NUMBERS = {E4M3: plain.E4M3, E5M2: plain.E5M2}
FORMATS = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
SCALES = pytest.mark.parametrize("scales", ["fp32", "power_of_two"])
Scales = Literal["fp32", "power_of_two"]


def mixed(*shape: int, seed: int = 0) -> torch.Tensor:
    """Magnitudes over nine decades, a tenth of them 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10.0 ** (torch.rand(shape, generator=generator) * 9 - 6)
    return x * (torch.rand(shape, generator=generator) > 0.1)


@FORMATS
def test_the_formats_numbers_are_torchs(fmt: Format) -> None:
    codes = torch.arange(128, dtype=torch.uint8).view(fmt.dtype).float()
    assert codes[codes.isfinite()].tolist() == NUMBERS[fmt]
    assert fmt.max == NUMBERS[fmt][-1] == torch.finfo(fmt.dtype).max


@FORMATS
def test_rounding_is_torchs_cast(fmt: Format) -> None:
    """At every number, halfway between neighbours, the fp32 numbers beside those, and all magnitudes below."""
    numbers = torch.tensor(NUMBERS[fmt])
    halves = (numbers[1:] + numbers[:-1]) / 2
    exact = torch.cat((numbers, halves))
    beside = [torch.nextafter(exact, torch.tensor(to)) for to in (-math.inf, math.inf)]
    every_exponent = torch.logspace(-130, math.log2(fmt.max), 40001, base=2).clamp(max=fmt.max)
    x = torch.cat((exact, *beside, every_exponent))
    x = torch.cat((x, -x))
    assert torch.equal(round_to(x, fmt), x.to(fmt.dtype).float())
    assert round_to(torch.tensor([math.nan, math.inf]), fmt).isfinite().sum() == 0


@SCALES
@FORMATS
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (128, 1), (128, 128)])
def test_blocks_have_scales_of_their_own(rows: int, columns: int, fmt: Format, scales: Scales) -> None:
    """Sizes that are no multiple of 128, and smaller ones; rows that are far apart in memory."""
    for shape in ((3, 300), (300, 3), (130, 140), (5, 7)):
        x = mixed(shape[0], 2 * shape[1])[:, ::2]
        got, _ = rounded(x, Grid(Block(rows, columns), fmt, scales))
        want = plain.rounded(x, rows, columns, NUMBERS[fmt], power_of_two=scales == "power_of_two")
        assert torch.equal(got, want), shape


def test_codes_times_scales_are_what_is_rounded() -> None:
    x = mixed(130, 300)
    for block in (Block(1, 128), Block(128, 1), Block(128, 128), Block(None, None)):
        codes, scales = codes_and_scales(x, Grid(block))
        assert torch.equal(codes * scales, rounded(x, Grid(block))[0])
        assert torch.equal(codes, codes.to(torch.float8_e4m3fn).float())
        assert codes.abs().max() == 448


def test_one_scale_a_tensor_and_each_expert_by_itself() -> None:
    x = mixed(4, 30, 20)
    per_expert, _ = rounded(x, Grid(Block(None, None)))
    for expert in range(4):
        assert torch.equal(per_expert[expert], plain.rounded(x[expert], 30, 20))


def test_experts_share_no_block() -> None:
    x = mixed(3, 100, 20) * torch.tensor([1.0, 1e3, 1e-3]).view(3, 1, 1)
    got, _ = rounded(x, Grid(Block(128, 128)))
    for expert in range(3):
        assert torch.equal(got[expert], plain.rounded(x[expert], 128, 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrower_inputs_are_rounded_in_fp32(dtype: torch.dtype) -> None:
    x = mixed(4, 200).to(dtype)
    got, _ = rounded(x, Grid(Block(1, 128)))
    assert got.dtype == torch.float32
    assert torch.equal(got, plain.rounded(x.float(), 1, 128))


@SCALES
@pytest.mark.parametrize("size", [1e-23, 1e-38, 1e-44, 3e38])
def test_any_size_of_number_stays_one(size: float, scales: Scales) -> None:
    x = torch.tensor([[1.0, -0.5, 0.0, 0.25] * 32] * 2) * size
    got, _ = rounded(x, Grid(Block(1, 128), E4M3, scales))
    assert got.isfinite().all()
    if size > 1e-32:
        torch.testing.assert_close(got, x, rtol=0.07, atol=0)


@SCALES
def test_zeros_have_the_scale_one(scales: Scales) -> None:
    codes, found = codes_and_scales(torch.zeros(3, 200), Grid(Block(1, 128), E4M3, scales))
    assert not codes.any()
    assert torch.equal(found, torch.ones(3, 200))


@SCALES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("block", [Block(1, 128), Block(128, 1), Block(128, 128), Block(None, None)])
def test_what_is_not_finite_stays_so(block: Block, bad: float, scales: Scales) -> None:
    x = mixed(150, 300)
    x[140, 290] = bad
    got, _ = rounded(x, Grid(block, E4M3, scales))
    rows = slice(140 // (block.rows or 150) * (block.rows or 150), 140 + 1)
    columns = slice(290 // (block.columns or 300) * (block.columns or 300), 290 + 1)
    assert got[rows, columns].isnan().all()
    assert got[:, 0].isfinite().all() or block.rows is None


@SCALES
def test_lost_and_largest_values_are_counted(scales: Scales) -> None:
    x = mixed(70, 300)
    got, counts = rounded(x, Grid(Block(1, 128), E4M3, scales), count=True)
    codes, _ = codes_and_scales(x, Grid(Block(1, 128), E4M3, scales))
    assert counts is not None
    assert int(counts.values) == x.numel()
    assert int(counts.underflown) == int(((x != 0) & (got == 0)).sum()) > 100
    assert int(counts.saturated) == int((codes.abs() == 448).sum())
    assert int(counts.saturated) >= (70 * 3 if scales == "fp32" else 1)
    assert rounded(x, Grid(Block(1, 128)))[1] is None
