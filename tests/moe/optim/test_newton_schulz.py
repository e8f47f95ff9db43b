"""Orthogonalisation against singular value decompositions and the plain iteration in numpy."""

import numpy as np
import pytest
import torch

from moe.optim.newton_schulz import orthogonalise


def with_condition(rows: int, columns: int, condition: float, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall from 1 to 1 / condition, evenly in the logarithm, fp64."""
    generator = torch.Generator().manual_seed(seed)
    small = min(rows, columns)
    u, _ = torch.linalg.qr(torch.randn(rows, small, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, small, generator=generator, dtype=torch.float64))
    s = torch.logspace(0, -np.log10(condition), small, dtype=torch.float64)
    x: torch.Tensor = (u * s) @ v.T
    return x


def plain(x: torch.Tensor) -> torch.Tensor:
    """The iteration as it is written, M M^T whatever the shape, in fp64."""
    m = x.double().numpy()
    m = m / np.sqrt((m**2).sum())
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2:
        gram = m @ m.T
        m = a * m + b * gram @ m + c * gram @ gram @ m
    return torch.from_numpy(m)


SHAPES = [(64, 128), (128, 64), (32, 32), (5, 48)]


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_singular_values_end_within_a_hundredth_of_one(shape: tuple[int, int], condition: float) -> None:
    x = with_condition(*shape, condition)
    y = orthogonalise(x.float().unsqueeze(0))[0]
    values = torch.linalg.svdvals(y.double())
    assert values.min() > 0.99
    assert values.max() < 1.01
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert (y - u @ v).abs().max() < 0.01
    torch.testing.assert_close(y.double(), plain(x), rtol=0, atol=2e-4)


def test_small_singular_values_rise_as_far_as_eight_and_two_steps_take_them() -> None:
    x = with_condition(64, 128, 1e5)
    y = orthogonalise(x.float().unsqueeze(0))[0].double()
    torch.testing.assert_close(y, plain(x), rtol=0, atol=5e-3)
    assert 0.3 < torch.linalg.svdvals(y).min() < 0.5


def test_the_last_two_steps_are_needed() -> None:
    """A planted control: eight steps alone leave singular values of 0.68 to 1.13 (found in numpy)."""
    x = with_condition(64, 128, 1e3)
    m = x / x.norm()
    for _ in range(8):
        gram = m @ m.T
        m = 3.4445 * m - 4.7750 * gram @ m + 2.0315 * gram @ gram @ m
    values = torch.linalg.svdvals(m)
    assert values.min() < 0.8
    assert values.max() > 1.1


def test_bf16_products_end_within_three_hundredths_of_one() -> None:
    for seed, shape in enumerate(SHAPES):
        y = orthogonalise(with_condition(*shape, 100.0, seed).float().unsqueeze(0), torch.bfloat16)[0]
        assert y.dtype == torch.float32
        values = torch.linalg.svdvals(y.double())
        assert (values - 1).abs().max() < 0.03, (shape, values)


def test_matrices_of_a_stack_do_not_see_each_other() -> None:
    stack = torch.stack([with_condition(12, 20, 50.0, seed).float() * 10.0**seed for seed in range(3)])
    for alone, together in zip(stack, orthogonalise(stack), strict=True):
        torch.testing.assert_close(orthogonalise(alone.unsqueeze(0))[0], together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e6, 1e30])
def test_the_size_of_a_matrix_does_not_matter(scale: float) -> None:
    x = with_condition(12, 20, 50.0).float().unsqueeze(0)
    torch.testing.assert_close(orthogonalise(x * scale), orthogonalise(x), rtol=0, atol=1e-5)


def test_zeros_stay_zeros() -> None:
    assert orthogonalise(torch.zeros(2, 4, 6)).equal(torch.zeros(2, 4, 6))
    assert orthogonalise(torch.zeros(1, 6, 4), torch.bfloat16).equal(torch.zeros(1, 6, 4))
