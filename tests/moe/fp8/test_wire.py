"""Rows of FP8 dispatch: rounded once, carried as bytes without loss."""

import math

import pytest
import torch

from moe.fp8.tally import Tally
from moe.fp8.wire import Fp8Rows
from tests.moe.fp8 import plain
from tests.moe.fp8.test_quantise import mixed
from tests.moe.tiny import same_bits

ROWS = Fp8Rows(Tally(torch.device("cpu")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_in_tiles_with_powers_of_two(dtype: torch.dtype) -> None:
    x = mixed(6, 300).to(dtype)
    got = ROWS.round(x)
    assert got.dtype == dtype
    assert torch.equal(got.float(), plain.rounded(x.float(), 1, 128, power_of_two=True))


def test_rounding_rounded_rows_changes_nothing() -> None:
    """Also where the largest value was rounded down to half the format's range, so that the scale halves."""
    x = mixed(200, 300)
    x[0, :128] = torch.linspace(0, 1, 128) * 224.001
    x[1, :128] = torch.linspace(0, 1, 128) * 448.0
    once = ROWS.round(x)
    assert torch.equal(ROWS.round(once), once)
    assert torch.equal(plain.rounded(once[:20], 1, 128, power_of_two=True), once[:20])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [300, 256, 40])
def test_bytes_carry_rounded_rows_exactly(width: int, dtype: torch.dtype) -> None:
    x = mixed(50, width).to(dtype)
    x[3] = 0
    x[4] *= 1e-37
    rows = ROWS.round(x)
    coded = ROWS.encode(rows)
    assert coded.dtype == torch.uint8
    assert coded.shape == (50, width + math.ceil(width / 128))
    back = ROWS.decode(coded, width, dtype)
    assert torch.equal(back, rows)
    assert back.dtype == dtype
    assert ROWS.decode(ROWS.encode(rows[:0]), width, dtype).shape == (0, width)


def test_bytes_are_torchs_cast_and_exponents() -> None:
    x = torch.zeros(1, 130)
    x[0, :3] = torch.tensor([448.0 * 4, -8.0, 0.0])
    x[0, 128] = 448.0 / 1024
    coded = ROWS.encode(x)[0].tolist()
    codes = (x[0, :3] / 4).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    assert coded[:3] == codes
    assert coded[130:] == [127 + 2, 127 - 10]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_arrives_so(bad: float) -> None:
    x = mixed(4, 300)
    x[2, 140] = bad
    rows = ROWS.round(x)
    back = ROWS.decode(ROWS.encode(rows), 300, torch.float32)
    assert not back[2, 140].isfinite()
    assert back[:2].isfinite().all()
    assert torch.equal(back.isfinite(), rows.isfinite())


def test_the_gradient_passes_straight_through() -> None:
    x = mixed(4, 300).requires_grad_()
    g = mixed(4, 300, seed=1)
    ROWS.round(x).backward(g)
    assert x.grad is not None
    assert same_bits(x.grad, g)
