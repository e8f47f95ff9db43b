"""The budget rule against LongCat-Flash's formula (arXiv 2509.01322, section 2.1), and what it holds in training."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from moe.config.balance import BiasScheduleConfig, BudgetBalanceConfig
from moe.config.model import ModelConfig, MoeConfig
from moe.layers.router import Router
from moe.stability.budget import BudgetBalance
from moe.stability.technique import StepLoad
from tests.moe.build import ALONE
from tests.moe.stability.moments import START
from tests.moe.tiny import tiny_config, tiny_trainer

EXPERTS, IDENTITIES, TOP_K, TARGET, RATE = 6, 3, 4, 2.5, 1e-2
MOE = MoeConfig(num_experts=EXPERTS, num_identity_experts=IDENTITIES, top_k=TOP_K, experts_per_token=TARGET)


def rule(moe: MoeConfig = MOE, **config: Any) -> BudgetBalance:
    made = BudgetBalanceConfig.model_validate({"bias_update_rate": RATE} | config)
    return BudgetBalance(made, ModelConfig(moe=moe, num_layers=2), ALONE)


def counts(step: int, tokens: int = 90) -> list[int]:
    """How often each output was chosen; every token chooses TOP_K of them, the first more often."""
    generator = torch.Generator().manual_seed(step)
    weight_E = torch.linspace(3, 1, EXPERTS + IDENTITIES).expand(tokens, -1)
    ids = torch.multinomial(weight_E, TOP_K, generator=generator)
    return ids.flatten().bincount(minlength=EXPERTS + IDENTITIES).tolist()


@pytest.mark.parametrize("scale", [1, 1000])
def test_steps_are_those_of_the_formula(scale: int) -> None:
    router, tokens = Router(5, MOE), 90
    bias = [0.0] * (EXPERTS + IDENTITIES)
    mu = RATE * TOP_K * EXPERTS / TARGET
    technique = rule()
    for step in range(10):
        load = counts(step)
        technique.after_step([router], StepLoad(torch.tensor([load]) * scale), START)
        for expert in range(EXPERTS):
            bias[expert] += mu * (TARGET / (TOP_K * EXPERTS) - load[expert] / (TOP_K * tokens))
    assert router.expert_bias_E.tolist() == pytest.approx(bias, abs=1e-7)
    assert router.expert_bias_E[EXPERTS:].tolist() == [0.0] * IDENTITIES
    # Identities have had too few tokens: what holds the budget is that the others' mean is not 0.
    assert router.expert_bias_E[:EXPERTS].mean() < -RATE


def test_an_expert_at_its_share_stays_and_a_step_of_padding_moves_nothing() -> None:
    router = Router(5, MOE)
    share = round(TARGET * 96 / EXPERTS)
    even = [share] * EXPERTS + [96 * TOP_K - share * EXPERTS, 0, 0]
    rule().after_step([router], StepLoad(torch.tensor([even])), START)
    rule().after_step([router], StepLoad(torch.zeros(1, EXPERTS + IDENTITIES, dtype=torch.int64)), START)
    assert not router.expert_bias_E.any()


def test_schedule_and_stages_scale_the_step() -> None:
    load = StepLoad(torch.tensor([counts(0)]))
    plain, half, none = (Router(5, MOE) for _ in range(3))
    rule().after_step([plain], load, START)
    rule(schedule=BiasScheduleConfig(warmup_steps=2)).after_step([half], load, START)
    rule().after_step([none], load, replace(START, bias_update_rate=0.0))
    torch.testing.assert_close(half.expert_bias_E, plain.expert_bias_E / 2)
    assert not none.expert_bias_E.any()


@pytest.mark.parametrize("target", [1.2, 2.6])
def test_training_comes_to_the_budget_and_holds_it(target: float) -> None:
    """From an even choice among 8 + 8, which gives 2 of 4."""
    moe = {"num_experts": 8, "num_identity_experts": 8, "top_k": 4, "experts_per_token": target}
    budget = {"kind": "budget", "bias_update_rate": 2e-2}
    trainer = tiny_trainer(
        tiny_config({"model": {"moe": moe}, "stability": {"balance": budget}, "schedule": {"steps": 60}})
    )
    means = [trainer.step().metrics["moe/real_experts_mean"] for _ in range(60)]
    assert means[0] == pytest.approx(2.0, rel=0.1)
    assert sum(means[30:]) / 30 == pytest.approx(target, rel=0.02)


@pytest.mark.parametrize(
    ("moe", "balance", "named"),
    [
        (IDENTITIES, {"kind": "sign"}, "num_identity_experts is above 0: take budget, or none"),
        (IDENTITIES, {"kind": "proportional"}, "take budget, or none"),
        (IDENTITIES, {"kind": "smebu"}, "take budget, or none"),
        (IDENTITIES, {"kind": "quantile"}, "take budget, or none"),
        (0, {"kind": "budget"}, "num_identity_experts is 0, so every token passes top_k"),
        ((IDENTITIES, 1.0), {"kind": "none"}, "nothing holds it: set the kind to budget"),
    ],
)
def test_a_rule_that_cannot_hold_the_budget_is_refused_in_one_line(moe: Any, balance: Any, named: str) -> None:
    identities, target = moe if isinstance(moe, tuple) else (moe, None)
    change = {"num_identity_experts": identities, "experts_per_token": target}
    with pytest.raises(ValidationError, match=named):
        tiny_config({"model": {"moe": change}, "stability": {"balance": balance}})


def test_identities_go_without_a_rule_too() -> None:
    tiny_config({"model": {"moe": {"num_identity_experts": 3}}, "stability": {"balance": {"kind": "none"}}})
