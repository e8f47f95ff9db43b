import math
from typing import Any

import pytest
import torch

from moe.config.model import MoeConfig
from moe.layers.router import Router

WIDTH = 24
BASE = {"num_experts": 16, "top_k": 4}
GROUPS = {"num_groups": 4, "top_groups": 2}


def router_of(bias: tuple[float, float] = (-0.2, 0.2), **config: Any) -> Router:
    generator = torch.Generator().manual_seed(3)
    router = Router(WIDTH, MoeConfig.model_validate(BASE | config))
    with torch.no_grad():
        router.weight.normal_(0.0, 0.3, generator=generator)
        router.expert_bias_E.uniform_(*bias, generator=generator)
    return router


def tokens(count: int = 200) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(4))


def plain_affinities(router: Router, x: torch.Tensor, kind: str) -> list[list[float]]:
    logits = (x.double() @ router.weight.detach().double().T).tolist()
    if kind == "sigmoid":
        return [[1 / (1 + math.exp(-z)) for z in row] for row in logits]
    if kind == "sqrt_softplus":
        return [[math.sqrt(math.log1p(math.exp(z))) for z in row] for row in logits]
    return [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logits]


def plain_route(affinities: list[float], biases: list[float], c: MoeConfig) -> dict[int, float]:
    """Expert -> gate of one token, by the words of the paper."""
    biased = [a + b for a, b in zip(affinities, biases, strict=True)]
    size = c.num_experts // c.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(c.num_groups)]
    scores = biased if c.group_score == "biased" else affinities
    groups.sort(key=lambda members: -sum(sorted((scores[e] for e in members), reverse=True)[:2]))
    allowed = [expert for members in groups[: c.top_groups] for expert in members]
    chosen = sorted(allowed, key=lambda expert: -biased[expert])[: c.top_k]
    total = sum(affinities[e] for e in chosen) if c.normalize_gates else 1.0
    return {e: c.routed_scaling_factor * affinities[e] / total for e in chosen}


@pytest.mark.parametrize("bias", [(-0.2, 0.2), (-2.0, -1.2), (5.0, 5.5)], ids=["mixed", "negative", "large"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        GROUPS,
        {"group_score": "unbiased", **GROUPS},
        {"num_groups": 8, "top_groups": 3},
        {"num_groups": 16, "top_groups": 16},
        {"affinity": "softmax"},
        {"affinity": "softmax", "normalize_gates": False, **GROUPS},
        {"affinity": "sqrt_softplus"},
        {"affinity": "sqrt_softplus", **GROUPS},
        {"normalize_gates": False, "routed_scaling_factor": 2.5},
        {"routed_scaling_factor": 2.5},
        {"top_k": 1},
        {"top_k": 16},
    ],
    ids=str,
)
def test_selection_and_gates_follow_the_paper(config: dict[str, Any], bias: tuple[float, float]) -> None:
    router, x = router_of(bias, **config), tokens()
    routing = router(x)
    biases = router.expert_bias_E.tolist()
    affinities = plain_affinities(router, x, router.config.affinity)
    expected = [plain_route(row, biases, router.config) for row in affinities]
    assert [set(row) for row in routing.ids_TK.tolist()] == [set(row) for row in expected]
    for ids, gates, gate_of in zip(routing.ids_TK.tolist(), routing.gates_TK.tolist(), expected, strict=True):
        assert gates == pytest.approx([gate_of[e] for e in ids], rel=1e-5)
    torch.testing.assert_close(
        routing.affinity_TE.double(), torch.tensor(affinities, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )
    loads = [sum(e in row for row in expected) for e in range(router.config.num_experts)]
    assert routing.load_E.tolist() == loads
    assert routing.load_E.dtype == torch.int64


@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("shift", [-3.0, -0.25, 1.0, 7.0])
def test_a_shift_of_all_biases_changes_no_bit(num_groups: int, shift: float) -> None:
    router, x = router_of(top_k=6, num_groups=num_groups, top_groups=(num_groups + 1) // 2), tokens()
    before = router(x)
    with torch.no_grad():
        router.expert_bias_E += shift
    after = router(x)
    assert torch.equal(before.ids_TK, after.ids_TK)
    assert torch.equal(before.gates_TK, after.gates_TK)


def test_gates_change_no_bit_where_biases_reorder_the_same_experts() -> None:
    router, x = router_of(top_k=6), tokens(2000)
    before = router(x)
    order_before = (before.affinity_TE + router.expert_bias_E).argsort(dim=-1, descending=True)[:, :6]
    with torch.no_grad():
        router.expert_bias_E.add_(torch.linspace(-3, 3, 16).sin(), alpha=0.1)
    after = router(x)
    order_after = (after.affinity_TE + router.expert_bias_E).argsort(dim=-1, descending=True)[:, :6]
    same_T = (order_before.sort(dim=-1).values == order_after.sort(dim=-1).values).all(dim=-1)
    reordered_T = same_T & (order_before != order_after).any(dim=-1)
    assert reordered_T.sum() > 200
    gates = [torch.zeros(2000, 16).scatter(1, r.ids_TK, r.gates_TK.detach())[same_T] for r in (before, after)]
    assert torch.equal(*gates)


def test_padding_is_routed_but_not_counted() -> None:
    router, x = router_of(), tokens()
    real_T = torch.rand(len(x), generator=torch.Generator().manual_seed(6)) < 0.6
    padded, alone, full = router(x, real_T), router(x[real_T]), router(x)
    assert torch.equal(padded.load_E, alone.load_E)
    assert torch.equal(padded.ids_TK, full.ids_TK)
    assert router(x, torch.zeros(len(x), dtype=torch.bool)).load_E.tolist() == [0] * 16


def test_the_router_stays_in_fp32_whatever_comes_in() -> None:
    router, x = router_of(), tokens().bfloat16()
    routing = router(x)
    exact = router(x.float())
    assert {routing.logits_TE.dtype, routing.affinity_TE.dtype, routing.gates_TK.dtype} == {torch.float32}
    assert torch.equal(routing.gates_TK, exact.gates_TK)


def test_the_gate_has_a_gradient_and_the_bias_has_none() -> None:
    router, x = router_of(), tokens().requires_grad_()
    (router(x).gates_TK * torch.linspace(-1, 1, 4)).sum().backward()
    assert router.weight.grad is not None
    assert float(router.weight.grad.norm()) > 0
    assert x.grad is not None
    assert float(x.grad.norm()) > 0
    assert not router.expert_bias_E.requires_grad
