"""Layers in FP8 multiply what the recipe says, forward and backward, against operands rounded one by one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moe.config.activation import SwigluConfig
from moe.config.fp8 import DeepseekV3Fp8Config
from moe.fp8.products import Fp8Products
from moe.fp8.tally import Tally
from moe.fp8.wire import Fp8Rows
from moe.layers.activation import build_activation
from moe.layers.experts import Experts
from moe.layers.linear import Linear
from tests.moe.fp8 import plain

CPU = torch.device("cpu")


def products(**options: Any) -> Fp8Products:
    return Fp8Products(DeepseekV3Fp8Config.model_validate(options), Tally(CPU))


def values(*shape: int, seed: int) -> torch.Tensor:
    """Each row and each column of a size of its own, so that a scale along the wrong dimension shows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [10 ** torch.rand(n, generator=generator) for n in shape[-2:]]
    return torch.randn(shape, generator=generator) * sizes[0].unsqueeze(1) * sizes[1]


def linear(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Output and both gradients of a Linear."""
    layer = Linear(w.shape[1], w.shape[0])
    layer.products = products(**options)
    with torch.no_grad():
        layer.weight.copy_(w)
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    assert x.grad is not None
    assert layer.weight.grad is not None
    return [y.detach(), x.grad, layer.weight.grad]


def plain_linear(
    x: torch.Tensor, w: torch.Tensor, g: torch.Tensor, numbers: list[float] = plain.E4M3, *, power_of_two: bool = False
) -> list[torch.Tensor]:
    """Every operand rounded along what its product sums over."""

    def along_columns(t: torch.Tensor, numbers: list[float] = plain.E4M3) -> torch.Tensor:
        return plain.rounded(t, 1, 128, numbers, power_of_two=power_of_two)

    blocks = plain.rounded(w, 128, 128, power_of_two=power_of_two)
    return [
        along_columns(x) @ blocks.t(),
        along_columns(g, numbers) @ blocks,
        along_columns(g.t(), numbers) @ along_columns(x.t()).t(),
    ]


X, W, G = values(140, 150, seed=0), values(135, 150, seed=1), values(140, 135, seed=2)


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, {}),
        ({"scales": "power_of_two"}, {"power_of_two": True}),
        ({"gradients": "e5m2"}, {"numbers": plain.E5M2}),
    ],
)
def test_a_linear_layer_is_the_plain_formula(options: dict[str, Any], formula: dict[str, Any]) -> None:
    for got, want in zip(linear(X, W, G, **options), plain_linear(X, W, G, **formula), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_one_scale_a_tensor_is_the_plain_formula() -> None:
    x, w, g = (plain.rounded(t, 10**6, 10**6) for t in (X, W, G))
    for got, want in zip(linear(X, W, G, scaling="tensor"), [x @ w.t(), g @ w, g.t() @ x], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("accumulation", ["promoted", "unpromoted"])
def test_emulated_sums_come_near_in_all_three_products(accumulation: str) -> None:
    exact = plain_linear(X, W, G)
    for got, want in zip(linear(X, W, G, accumulation=accumulation), exact, strict=True):
        off = float((got - want).norm() / want.norm())
        assert 1e-6 < off < 2e-3


def test_bf16_rows_give_bf16_rows_and_fp32_weight_gradients() -> None:
    x, g = X.bfloat16(), G.bfloat16()
    got = linear(x, W, g)
    want = plain_linear(x.float(), W, g.float())
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for a, b, tolerance in zip(got, want, (4e-3, 4e-3, 1e-5), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=1e-5 * float(b.abs().max()))


def test_leading_dimensions_stay() -> None:
    layer = Linear(150, 135)
    layer.products = products()
    with torch.no_grad():
        layer.weight.copy_(W)
        assert torch.equal(layer(X.view(4, 35, 150)), layer(X).view(4, 35, 135))


def test_an_outlier_channel_costs_one_scale_a_tensor_more_than_tiles() -> None:
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(64, 512, generator=generator), torch.randn(32, 512, generator=generator)
    # Its weights are 0, so that it takes no part itself and only the others' rounding shows.
    x[:, 7] *= 100
    w[:, 7] = 0
    # Rows of small values, as any batch has some: with the outlier's scale they fall below the format.
    x[::2] *= 1e-3
    exact = (x.double() @ w.double().t())[::2]
    off = {
        scaling: float((linear(x, w, torch.zeros(64, 32), scaling=scaling)[0][::2] - exact).norm() / exact.norm())
        for scaling in ("tiles", "tensor")
    }
    assert off["tensor"] > 2 * off["tiles"]


def experts_with(
    ids_RK: torch.Tensor, x: torch.Tensor, gates: torch.Tensor, g: torch.Tensor
) -> dict[str, torch.Tensor]:
    experts = Experts(4, 150, 70, build_activation(SwigluConfig()))
    experts.up_products, experts.down_products = products(), products()
    with torch.no_grad():
        experts.w_up.copy_(values(4, 140, 150, seed=4) / 50)
        experts.w_down.copy_(values(4, 150, 70, seed=5) / 50)
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    y = experts(x, ids_RK, gates)
    y.backward(g)
    found = {"y": y, "x": x.grad, "gates": gates.grad, "up": experts.w_up.grad, "down": experts.w_down.grad}
    found |= {"w_up": experts.w_up, "w_down": experts.w_down}
    return {name: t.detach() for name, t in found.items() if t is not None}


def test_experts_are_the_plain_formula_and_one_without_rows_gets_exact_zeros() -> None:
    """Expert by expert; tiles along tokens begin with each expert's rows. Expert 2 has none, expert 0 over 128."""
    generator = torch.Generator().manual_seed(6)
    rows = 160
    ids = torch.stack((torch.zeros(rows, dtype=torch.int64), torch.tensor([1, 3]).repeat(rows // 2)), dim=1)
    ids[5, 0] = ids[9, 1] = -1
    x, gates = values(rows, 150, seed=7) / 50, torch.rand(rows, 2, generator=generator)
    g = values(rows, 150, seed=8)
    got = experts_with(ids, x, gates, g)
    y, dx, dgates = torch.zeros(rows, 150), torch.zeros(rows, 150), torch.zeros(rows, 2)
    for e in range(4):
        row, slot = (ids == e).nonzero(as_tuple=True)
        if not len(row):
            assert not got["up"][e].any()
            assert not got["down"][e].any()
            continue
        gate = gates[row, slot].unsqueeze(1)
        h = plain_linear(x[row], got["w_up"][e], torch.zeros(len(row), 140))[0]
        h.requires_grad_()
        activated = F.silu(h[:, :70]) * h[:, 70:]
        weighted = (activated * gate).detach()
        out, dweighted, ddown = plain_linear(weighted, got["w_down"][e], g[row])
        activated.backward(dweighted * gate)
        assert h.grad is not None
        _, dx_e, dup = plain_linear(x[row], got["w_up"][e], h.grad)
        y[row] += out
        dx[row] += dx_e
        dgates[row, slot] = (dweighted * activated.detach()).sum(dim=1)
        for name, want in (("up", dup), ("down", ddown)):
            off = (got[name][e] - want).norm() / want.norm()
            # A value of the activation may fall on the other side of a tie, since SwiGLU is not computed in one way.
            assert off < 2e-3, (name, e)
    for name, want in (("y", y), ("x", dx), ("gates", dgates)):
        assert (got[name] - want).norm() / want.norm() < 2e-3, name


@pytest.mark.parametrize("options", [{}, {"scales": "power_of_two"}, {"scaling": "tensor"}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_every_gradient(bad: float, options: dict[str, Any]) -> None:
    g = G.clone()
    g[3, 4] = bad
    y, dx, dw = linear(X, W, g, **options)
    assert y.isfinite().all()
    assert not dx[3].isfinite().any()
    assert not dw[4].isfinite().any()
    x = X.clone()
    x[3, 4] = bad
    y, _, dw = linear(x, W, G, **options)
    assert not y[3].isfinite().any()
    assert not dw[:, 4].isfinite().any()


def test_dispatched_rows_are_not_rounded_again() -> None:
    """Where the forward would round them in its tiles, with power-of-two scales, nothing changes."""
    tally = Tally(CPU)
    rows = Fp8Rows(tally).round(X)
    config = DeepseekV3Fp8Config(scales="power_of_two")
    w = W.unsqueeze(0)
    taken = Fp8Products(config, tally, dispatched=True)
    again = Fp8Products(config, tally)
    assert torch.equal(taken.forward(rows, w, [140]), again.forward(rows, w, [140]))
    assert torch.equal(taken.weight_gradient(G, rows, [140]), again.weight_gradient(G, rows, [140]))
    # With other scales elsewhere, these rows keep power-of-two ones.
    other = Fp8Products(DeepseekV3Fp8Config(), tally, dispatched=True)
    want = plain.rounded(G.t(), 1, 128) @ plain.rounded(rows.t(), 1, 128, power_of_two=True).t()
    torch.testing.assert_close(other.weight_gradient(G, rows, [140])[0], want, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(other.forward(rows, w, [140]), rows @ plain.rounded(W, 128, 128).t())
