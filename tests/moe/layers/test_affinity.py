"""Affinities against their formulas in fp64, against Hugging Face's DeepSeek-V4, and far out where fp32 underflows."""

import math
from typing import Any

import pytest
import torch

from moe.config.model import Affinity, MoeConfig
from moe.layers.affinity import affinities, affinity_shares
from moe.layers.router import Router

KINDS: tuple[Affinity, ...] = ("sigmoid", "softmax", "sqrt_softplus")


def plain(row: list[float], kind: str) -> list[float]:
    if kind == "sigmoid":
        return [1 / (1 + math.exp(-x)) for x in row]
    if kind == "softmax":
        return [math.exp(x) / sum(map(math.exp, row)) for x in row]
    return [math.sqrt(math.log1p(math.exp(x))) for x in row]


@pytest.mark.parametrize("kind", KINDS)
def test_affinities_and_their_shares_are_those_of_the_formulas(kind: Affinity) -> None:
    logits_TE = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) * 12
    expected = [plain(row, kind) for row in logits_TE.double().tolist()]
    affinity_TE = affinities(logits_TE, kind)
    shares = [[s / sum(row) for s in row] for row in expected]
    for values_TE, wanted in ((affinity_TE, expected), (affinity_shares(logits_TE, affinity_TE, kind), shares)):
        assert values_TE.dtype == torch.float32
        torch.testing.assert_close(values_TE.double(), torch.tensor(wanted).double(), rtol=3e-6, atol=0)


def test_the_slope_of_sqrt_softplus_is_finite_and_right_everywhere() -> None:
    """``sigmoid(x) / (2 sqrt(softplus(x)))``, written so that fp64 does not underflow."""
    x = torch.tensor([-1e4, -500.0, -200.0, -104.0, -90.0, -50.0, -20.0, -19.9, -3.0, 0.0, 2.0, 19.9, 20.1, 90.0, 1e4])
    x.requires_grad_()
    y = affinities(x, "sqrt_softplus")
    [slope] = torch.autograd.grad(y.sum(), x)
    for at, value, got in zip(x.tolist(), y.tolist(), slope.tolist(), strict=True):
        softplus = max(at, 0.0) + math.log1p(math.exp(-abs(at)))
        small = at < -30
        want = math.exp(at / 2) / 2 if small else 1 / (1 + math.exp(-at)) / (2 * math.sqrt(softplus))
        # Subnormal numbers of fp32 keep few digits.
        assert got == pytest.approx(want, rel=1e-5, abs=1e-36), at
        assert value == pytest.approx(math.exp(at / 2) if small else math.sqrt(softplus), rel=1e-5, abs=1e-36), at


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [-1e4, -150.0, 0.0, 90.0, 1e4])
def test_shares_and_their_gradient_stay_finite_however_far_out(kind: Affinity, shift: float) -> None:
    logits_TE = (torch.tensor([[0.5, -1.0, 0.0, 2.0]]) + shift).requires_grad_()
    share_TE = affinity_shares(logits_TE, affinities(logits_TE, kind), kind)
    [gradient_TE] = torch.autograd.grad(share_TE[0, 0], logits_TE)
    assert share_TE.sum().item() == pytest.approx(1.0, rel=1e-5)
    assert gradient_TE.isfinite().all()
    if shift < -100:  # where the affinity is exp(x) or exp(x/2)
        power = 0.5 if kind == "sqrt_softplus" else 1.0
        torch.testing.assert_close(share_TE, (power * logits_TE).softmax(dim=-1))
        assert gradient_TE[0, 0] > 0.01


def test_routing_by_sqrt_softplus_is_that_of_hugging_face_deepseek_v4() -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    from transformers import DeepseekV4Config

    sizes: dict[str, Any] = {"n_routed_experts": 16, "num_experts_per_tok": 4, "hidden_size": 24}
    config = DeepseekV4Config(**sizes, routed_scaling_factor=1.5, scoring_func="sqrtsoftplus")
    theirs = modeling.DeepseekV4TopKRouter(config)
    ours = Router(24, MoeConfig(num_experts=16, top_k=4, affinity="sqrt_softplus", routed_scaling_factor=1.5))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        ours.weight.normal_(generator=generator)
        ours.expert_bias_E.normal_(0.0, 0.5, generator=generator)
        theirs.weight.copy_(ours.weight)
        theirs.e_score_correction_bias.copy_(ours.expert_bias_E)
    x_TD = torch.randn(300, 24, generator=generator)
    routing = ours(x_TD)
    _, gates_TK, ids_TK = theirs(x_TD)
    gates = [torch.zeros(300, 16).scatter(1, i, g) for i, g in ((routing.ids_TK, routing.gates_TK), (ids_TK, gates_TK))]
    assert torch.equal(gates[0] > 0, gates[1] > 0)
    torch.testing.assert_close(gates[0], gates[1])
    sum_of = (torch.linspace(-1, 1, 16) * gates[0]).sum(), (torch.linspace(-1, 1, 16) * gates[1]).sum()
    [a], [b] = torch.autograd.grad(sum_of[0], [ours.weight]), torch.autograd.grad(sum_of[1], [theirs.weight])
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
