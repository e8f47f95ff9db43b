"""Thresholds by quantiles against exact quantiles of all tokens, taken by sorting in plain Python."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from moe.config.balance import ThresholdBalanceConfig
from moe.config.model import Affinity, ModelConfig, MoeConfig
from moe.layers.router import Router
from moe.stability.quantile_balance import FINEST
from moe.stability.technique import StepLoad
from moe.stability.threshold_balance import ThresholdBalance
from tests.moe.build import ALONE
from tests.moe.stability.moments import START
from tests.moe.tiny import tiny_config, tiny_trainer

EXPERTS, TOP_K, WIDTH, TOKENS = 12, 3, 8, 480
SELECTION: dict[str, Any] = {"kind": "threshold", "max_experts": EXPERTS}


def setting(affinity: Affinity) -> tuple[ModelConfig, Router, torch.Tensor]:
    """A router with thresholds that are off, and tokens with something in common."""
    moe = {"num_experts": EXPERTS, "top_k": TOP_K, "affinity": affinity, "selection": SELECTION}
    model = ModelConfig(num_layers=2, moe=MoeConfig.model_validate(moe))
    generator = torch.Generator().manual_seed(0)
    router = Router(WIDTH, model.moe)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        router.expert_bias_E.uniform_(-0.4, -0.1, generator=generator)
    return model, router, torch.randn(TOKENS, WIDTH, generator=generator) + 0.6


@torch.no_grad()
def update(rule: ThresholdBalance, router: Router, x_TD: torch.Tensor, real_T: torch.Tensor | None = None) -> int:
    """One step over two micro-batches; how many choices there were."""
    rule.before_step(START)
    load_E = torch.zeros(EXPERTS, dtype=torch.int64)
    for rows in (slice(0, 200), slice(200, len(x_TD))):
        routing = router(x_TD[rows], None if real_T is None else real_T[rows])
        rule.after_forward([router], [routing])
        load_E += routing.load_E
    rule.after_step([router], StepLoad(load_E.unsqueeze(0)), START)
    return int(load_E.sum())


@pytest.mark.parametrize("affinity", ["sigmoid", "softmax", "sqrt_softplus"])
@pytest.mark.parametrize("smoothing", [0.0, 0.9])
def test_thresholds_move_to_the_exact_quantiles_within_a_bin(affinity: Affinity, smoothing: float) -> None:
    model, router, x_TD = setting(affinity)
    rule = ThresholdBalance(ThresholdBalanceConfig(smoothing=smoothing), model, ALONE)
    real_T = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1)) < 0.8
    for _ in range(3):
        before = (-router.expert_bias_E).tolist()
        affinity_TE = router(x_TD).affinity_TE[real_T].double()
        update(rule, router, x_TD, real_T)
        rank = math.ceil(len(affinity_TE) * (EXPERTS - TOP_K) / EXPERTS)
        for expert, beta in enumerate((-router.expert_bias_E).tolist()):
            quantile = sorted(affinity_TE[:, expert].tolist())[rank - 1]
            exact = smoothing * before[expert] + (1 - smoothing) * quantile
            # The stated width of the bin in which the margin lies.
            step = 0.08 if affinity == "sqrt_softplus" else 0.06
            width = step * math.exp(step) * (abs(quantile - before[expert]) + FINEST)
            assert abs(beta - exact) <= (1 - smoothing) * width + 1e-6


@pytest.mark.parametrize("affinity", ["sigmoid", "softmax", "sqrt_softplus"])
def test_a_few_updates_hold_the_mean_number_and_the_load(affinity: Affinity) -> None:
    model, router, x_TD = setting(affinity)
    rule = ThresholdBalance(ThresholdBalanceConfig(smoothing=0.5), model, ALONE)
    first = update(rule, router, x_TD)
    for _ in range(20):
        update(rule, router, x_TD)
    routing = router(x_TD)
    assert abs(first / TOKENS - TOP_K) > 0.3
    assert routing.load_E.sum().item() / TOKENS == pytest.approx(TOP_K, rel=0.02)
    assert routing.load_E.max() / routing.load_E.double().mean() < 1.05
    assert len(routing.experts_T.unique()) > 4


def test_tokens_are_routed_by_the_old_thresholds_and_padding_does_not_count() -> None:
    model, router, x_TD = setting("sigmoid")
    before = int(router(x_TD).load_E.sum())
    rule = ThresholdBalance(ThresholdBalanceConfig(), model, ALONE)
    assert update(rule, router, x_TD) == before
    _, other, _ = setting("sigmoid")
    padded = torch.cat((x_TD, 40 * torch.ones(60, WIDTH)))
    update(rule, other, padded, torch.arange(TOKENS + 60) < TOKENS)
    assert torch.equal(router.expert_bias_E, other.expert_bias_E)
    moved = other.expert_bias_E.clone()
    update(rule, other, padded, torch.zeros(TOKENS + 60) > 0)
    assert torch.equal(moved, other.expert_bias_E)


def test_training_holds_the_mean_number() -> None:
    """At a learning rate at which affinities do not run away from thresholds that lag behind by some steps."""
    changes: dict[str, Any] = {
        "model": {"moe": {"selection": {"kind": "threshold", "max_experts": 8}}},
        "stability": {"balance": {"kind": "threshold", "smoothing": 0.8}},
        "optimizer": {"lr": 1e-3},
        "schedule": {"steps": 40},
    }
    trainer = tiny_trainer(tiny_config(changes))
    reports = [trainer.step().metrics for _ in range(40)]
    means = [metrics["moe/real_experts_mean"] for metrics in reports]
    assert sum(means[20:]) / 20 == pytest.approx(2.0, rel=0.05)
    assert all(metrics["moe/real_experts_std"] > 0.5 for metrics in reports)
    assert all(0 < metrics["moe/real_experts_none"] < 0.5 for metrics in reports)


@pytest.mark.parametrize(
    ("selection", "balance", "named"),
    [
        ("threshold", {"kind": "sign"}, "selection.kind is threshold: threshold takes threshold, or none"),
        ("threshold", {"kind": "quantile"}, "threshold takes threshold, or none"),
        ("top_k", {"kind": "threshold"}, "stability.balance.kind is threshold, but model.moe.selection.kind is top_k"),
        ("threshold", {"kind": "budget"}, "take another kind"),
    ],
)
def test_a_rule_of_another_selection_is_refused_in_one_line(selection: str, balance: Any, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        tiny_config({"model": {"moe": {"selection": {"kind": selection}}}, "stability": {"balance": balance}})
