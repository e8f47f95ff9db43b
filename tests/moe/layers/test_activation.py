"""Gated activations against their formulas, finite differences and Hugging Face's deepseek_v4."""

import math
import os
import typing
from collections.abc import Callable

import pytest
import torch

from moe.config.activation import ActivationConfig, SituGluConfig, SwigluClampConfig, SwigluConfig
from moe.layers.activation import ACTIVATIONS, Activate, build_activation
from moe.layers.experts import Experts
from moe.layers.ffn import FeedForward

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def swiglu(gate: float, up: float) -> float:
    return gate * sigmoid(gate) * up


def swiglu_clamp(gate: float, up: float, limit: float = 10.0) -> float:
    return swiglu(min(gate, limit), min(max(up, -limit), limit))


def situ_glu(gate: float, up: float) -> float:
    return 4 * math.tanh(gate / 4) * sigmoid(gate) * 25 * math.tanh(up / 25)


Formula = Callable[[float, float], float]
KINDS: dict[str, tuple[ActivationConfig, Formula]] = {
    "swiglu": (SwigluConfig(), swiglu),
    "swiglu_clamp": (SwigluClampConfig(), swiglu_clamp),
    "swiglu_clamp, limit 0.5": (SwigluClampConfig(limit=0.5), lambda gate, up: swiglu_clamp(gate, up, 0.5)),
    "situ_glu": (SituGluConfig(), situ_glu),
}
BY_KIND = pytest.mark.parametrize(("config", "formula"), KINDS.values(), ids=KINDS.keys())

# Either side of every edge, far beyond it, and around 0.
POINTS = [0.0]
for near in (1e-3, 0.3, 0.499, 0.501, 1.0, 4.0, 7.0, 9.999, 10.001, 25.0, 60.0, 1e3):
    POINTS += [near, -near]
EDGES = [*POINTS, 0.5, -0.5, 10.0, -10.0]


def grid(points: list[float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """All pairs of a gate and an up-projection: h [points, 2 points], the gate the same along a row."""
    row = torch.tensor(points, dtype=dtype)
    return torch.cat((row.unsqueeze(1).expand(-1, len(points)), row.expand(len(points), -1)), dim=1)


def plain(h: torch.Tensor, formula: Formula) -> torch.Tensor:
    gates, ups = h.double().chunk(2, dim=-1)
    values = [formula(g, u) for g, u in zip(gates.flatten().tolist(), ups.flatten().tolist(), strict=True)]
    return torch.tensor(values, dtype=torch.float64).view_as(gates)


def gradients(h: torch.Tensor, config: ActivationConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """d(sum of activations) / d(gate) and / d(up) where each is weighted by 1."""
    leaf = h.clone().requires_grad_()
    Activate.apply(leaf, build_activation(config)).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    dgate, dup = leaf.grad.chunk(2, dim=-1)
    return dgate, dup


def test_every_kind_is_built() -> None:
    union = typing.get_args(typing.get_args(ActivationConfig)[0])
    assert set(union) == set(ACTIVATIONS)
    assert {type(config) for config, _ in KINDS.values()} == set(ACTIVATIONS)
    made = [type(build_activation(config())) for config in union]
    assert len(set(made)) == len(union)


@BY_KIND
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1.2e-2)]
)
def test_the_activation_is_the_formula(
    config: ActivationConfig, formula: Formula, dtype: torch.dtype, tolerance: float
) -> None:
    h = grid(EDGES, dtype)
    untouched = h.clone()
    y = build_activation(config).forward(h)
    assert y.dtype == dtype
    assert torch.equal(h, untouched)
    torch.testing.assert_close(y.double(), plain(h, formula), rtol=tolerance, atol=1e-12 if tolerance < 1e-9 else 1e-6)


@BY_KIND
def test_the_gradient_is_the_slope(config: ActivationConfig, formula: Formula) -> None:
    h, step = grid(POINTS), 1e-6
    for part, found in enumerate(gradients(h, config)):
        shift = torch.zeros_like(h)
        shift.chunk(2, dim=-1)[part].fill_(step)
        slope = (plain(h + shift, formula) - plain(h - shift, formula)) / (2 * step)
        torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-5)


@BY_KIND
def test_backward_gives_the_activation_as_well(config: ActivationConfig, formula: Formula) -> None:
    h = grid(EDGES)
    dactivated = torch.linspace(-2, 2, h.numel() // 2, dtype=torch.float64).view(len(h), -1)
    dh, y = build_activation(config).backward(h, dactivated.clone())
    torch.testing.assert_close(y, plain(h, formula), rtol=1e-12, atol=1e-12)
    dgate, dup = gradients(h, config)
    torch.testing.assert_close(dh, torch.cat((dgate * dactivated, dup * dactivated), dim=1))


@pytest.mark.parametrize("limit", [0.5, 10.0])
def test_a_clamped_coordinate_gets_no_gradient_and_one_at_the_edge_does(limit: float) -> None:
    h = grid(EDGES)
    gate, up = h.chunk(2, dim=-1)
    dgate, dup = gradients(h, SwigluClampConfig(limit=limit))
    assert (dgate[gate > limit] == 0).all()
    assert (dup[up.abs() > limit] == 0).all()
    assert (dgate[(gate == limit) & (up != 0)] != 0).all()
    assert (dup[(up.abs() == limit) & (gate.abs() > 0) & (gate > -100)] != 0).all()
    assert (dgate[(gate > -5) & (gate < -2) & (up != 0)] != 0).all(), "the gate is not clamped from below"


@pytest.mark.parametrize("config", [SwigluClampConfig(), SituGluConfig(), SwigluClampConfig(limit=3.0)])
def test_no_activation_exceeds_the_bound(config: SwigluClampConfig | SituGluConfig) -> None:
    bound = config.limit**2 if isinstance(config, SwigluClampConfig) else config.gate_bound * config.up_bound
    h = grid([*EDGES, 1e30, -1e30, math.inf], torch.float32)
    y = build_activation(config).forward(h)
    assert y.abs().max() <= bound * (1 + 1e-6)
    assert y.abs().max() > 0.95 * bound


def test_a_clamp_that_is_never_reached_changes_no_bit() -> None:
    h = grid([p for p in POINTS if abs(p) <= 10], torch.float32)
    dactivated = torch.linspace(-2, 2, h.numel() // 2).view(len(h), -1)
    plain, clamped = build_activation(SwigluConfig()), build_activation(SwigluClampConfig())
    assert torch.equal(plain.forward(h), clamped.forward(h))
    for a, b in zip(plain.backward(h, dactivated.clone()), clamped.backward(h, dactivated.clone()), strict=True):
        assert torch.equal(a, b)


@BY_KIND
def test_gradcheck_of_dense_layers_and_of_routed_experts(config: ActivationConfig, formula: Formula) -> None:
    generator = torch.Generator().manual_seed(5)
    activation = build_activation(config)

    def drawn(*shape: int, size: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * size).requires_grad_()

    # Large weights: pre-activations lie on both sides of the limits (and, drawn, on none of the edges).
    dense = FeedForward(3, 4, activation).double()
    experts = Experts(2, 3, 4, activation).double()
    ids = torch.tensor([[0, 1], [1, -1], [1, 0], [0, -1]])
    x, gates = drawn(4, 3), drawn(4, 2)
    for module, inputs in ((dense, (x,)), (experts, (x, gates))):
        names = [name for name, _ in module.named_parameters()]
        weights = [drawn(*p.shape, size=6.0 if "up" in name else 0.5) for name, p in module.named_parameters()]

        def function(*args: torch.Tensor, module: torch.nn.Module = module, names: list[str] = names) -> torch.Tensor:
            given, tensors = args[: -len(names)], args[-len(names) :]
            rest = (given[0], ids, given[1]) if isinstance(module, Experts) else given
            y: torch.Tensor = torch.func.functional_call(module, dict(zip(names, tensors, strict=True)), rest)
            return y

        assert torch.autograd.gradcheck(function, (*inputs, *weights), eps=1e-7, atol=1e-4)


def test_transformers_clamps_alike_in_dense_layers_and_experts() -> None:
    theirs = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    settings = pytest.importorskip("transformers").DeepseekV4Config(
        hidden_size=12,
        intermediate_size=10,
        moe_intermediate_size=10,
        n_routed_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        swiglu_limit=2.0,
    )
    settings._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(3)
    activation = build_activation(SwigluClampConfig(limit=2.0))
    x = torch.randn(20, 12, generator=generator)
    ids = torch.rand(20, 4, generator=generator).argsort(dim=1)[:, :2]
    gates = torch.rand(20, 2, generator=generator)
    with torch.no_grad():
        dense, mlp = FeedForward(12, 10, activation), theirs.DeepseekV4MLP(settings)
        experts, their_experts = Experts(4, 12, 10, activation), theirs.DeepseekV4Experts(settings)
        for parameter in (*dense.parameters(), *experts.parameters()):
            parameter.normal_(0.0, 1.0, generator=generator)
        mlp.gate_proj.weight.copy_(dense.gate_up.weight[:10])
        mlp.up_proj.weight.copy_(dense.gate_up.weight[10:])
        mlp.down_proj.weight.copy_(dense.down.weight)
        their_experts.gate_up_proj.copy_(experts.w_up)
        their_experts.down_proj.copy_(experts.w_down)
    for ours, reference, rest in ((dense, mlp, ()), (experts, their_experts, (ids, gates))):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours(a, *rest), reference(b, *rest)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm()
    torch.testing.assert_close(experts.w_up.grad, their_experts.gate_up_proj.grad, rtol=1e-4, atol=1e-3)
    assert dense.gate_up.weight.grad is not None
    torch.testing.assert_close(dense.gate_up.weight.grad[:10], mlp.gate_proj.weight.grad, rtol=1e-4, atol=1e-3)
