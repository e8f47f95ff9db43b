"""The rules that follow the load against their papers' formulas written out; exact counts, recentring, schedules."""

import math
from dataclasses import replace

import pytest
import torch

from moe.config.balance import (
    BiasScheduleConfig,
    ProportionalBalanceConfig,
    SignBalanceConfig,
    SmebuBalanceConfig,
)
from moe.config.model import ModelConfig, MoeConfig
from moe.layers.router import Router
from moe.stability.balance import ProportionalBalance, SignBalance, SmebuBalance
from moe.stability.technique import StepLoad
from tests.moe.build import ALONE
from tests.moe.stability.moments import START

RATE = 1e-3
EXPERTS = 12


def router(num_groups: int = 1, top_groups: int = 1) -> Router:
    made = Router(8, MoeConfig(num_experts=EXPERTS, top_k=3, num_groups=num_groups, top_groups=top_groups))
    torch.nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(0))
    return made


def technique() -> SignBalance:
    return SignBalance(SignBalanceConfig(bias_update_rate=RATE), ModelConfig(), ALONE)


def random_counts(step: int, layers: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 50, (layers, EXPERTS), generator=generator)


def plain_signs(counts: list[int]) -> list[float]:
    """+1 for an expert below the mean load, -1 above, 0 at it (arXiv 2408.15664, algorithm 1)."""
    mean = sum(counts) / len(counts)
    return [float((mean > count) - (mean < count)) for count in counts]


def test_a_bias_moves_towards_underloaded_experts_by_the_recentred_sign() -> None:
    routers, bias = [router(), router()], [[0.0] * EXPERTS for _ in range(2)]
    rule = technique()
    for step in range(20):
        counts_ME = random_counts(step, layers=2)
        rule.after_step(routers, StepLoad(counts_ME), START)
        for layer, counts in enumerate(counts_ME.tolist()):
            signs = plain_signs(counts)
            mean = sum(signs) / EXPERTS
            bias[layer] = [b + RATE * (sign - mean) for b, sign in zip(bias[layer], signs, strict=True)]
    for made, expected in zip(routers, bias, strict=True):
        torch.testing.assert_close(made.expert_bias_E, torch.tensor(expected), rtol=0, atol=1e-7)
        assert made.expert_bias_E.dtype == torch.float32
        assert made.expert_bias_E.abs().max() > 2 * RATE


def test_a_stage_may_replace_the_rate() -> None:
    made, rule = router(), technique()
    rule.after_step([made], StepLoad(random_counts(0)), replace(START, bias_update_rate=0.0))
    assert not made.expert_bias_E.any()
    rule.after_step([made], StepLoad(random_counts(0)), replace(START, bias_update_rate=3 * RATE))
    thrice, plain = made.expert_bias_E.clone(), router()
    rule.after_step([plain], StepLoad(random_counts(0)), START)
    torch.testing.assert_close(thrice, 3 * plain.expert_bias_E)


def test_an_expert_at_the_mean_load_stays_exactly_and_an_even_load_moves_nothing() -> None:
    made, rule = router(), technique()
    even = torch.full((1, EXPERTS), 2**40 + 1)  # no fp32 number: a mean in floating point would see a difference
    rule.after_step([made], StepLoad(even), START)
    assert not made.expert_bias_E.any()
    pair = even.clone()
    pair[0, 0] += 1
    pair[0, 1] -= 1
    rule.after_step([made], StepLoad(pair), START)
    assert made.expert_bias_E.tolist() == torch.tensor([-RATE, RATE] + [0.0] * (EXPERTS - 2)).tolist()


def test_the_bias_has_zero_mean_after_a_thousand_updates() -> None:
    made, rule = router(), technique()
    for step in range(1000):
        # One overloaded expert: unrecentred signs would add up to a mean of 0.83.
        counts = random_counts(step)
        counts[0, 0] += 500
        rule.after_step([made], StepLoad(counts), START)
    assert made.expert_bias_E.abs().max() > 0.5
    assert abs(made.expert_bias_E.double().mean().item()) < 1e-6


def test_recentring_changes_no_choice() -> None:
    for groups in ((1, 1), (4, 2)):
        recentred, shifted = router(*groups), router(*groups)
        rule = technique()
        for step in range(300):
            counts = random_counts(step)
            counts[0, :2] += 500
            rule.after_step([recentred], StepLoad(counts), START)
            shifted.expert_bias_E += RATE * torch.tensor(plain_signs(counts[0].tolist()))
        assert abs(shifted.expert_bias_E.mean().item()) > 0.05
        x_TD = torch.randn(500, 8, generator=torch.Generator().manual_seed(2))
        assert torch.equal(recentred(x_TD).ids_TK, shifted(x_TD).ids_TK)
        assert not torch.equal(recentred(x_TD).ids_TK, router(*groups)(x_TD).ids_TK), "the bias decides nothing here"


def test_the_bias_never_enters_a_gate() -> None:
    made = router()
    x_TD = torch.randn(50, 8, generator=torch.Generator().manual_seed(3))
    made.expert_bias_E.copy_(torch.linspace(-1, 1, EXPERTS))
    routing = made(x_TD)
    affinity_TK = (x_TD @ made.weight.T).sigmoid().gather(1, routing.ids_TK)
    expected = affinity_TK / affinity_TK.sum(dim=1, keepdim=True)
    torch.testing.assert_close(routing.gates_TK, expected, rtol=1e-5, atol=1e-6)


# ---- proportional ----------------------------------------------------------------------------------------------------


def centred(values: list[float]) -> list[float]:
    return [value - sum(values) / len(values) for value in values]


def test_a_proportional_step_is_the_relative_error_and_knows_no_batch_size() -> None:
    small, large, bias = router(), router(), [0.0] * EXPERTS
    rule = ProportionalBalance(ProportionalBalanceConfig(bias_update_rate=RATE), ModelConfig(), ALONE)
    for step in range(20):
        counts = random_counts(step)
        rule.after_step([small], StepLoad(counts), START)
        rule.after_step([large], StepLoad(counts * 1000), START)
        mean = counts.double().mean().item()
        bias = centred([b + RATE * (mean - c) / mean for b, c in zip(bias, counts[0].tolist(), strict=True)])
    torch.testing.assert_close(small.expert_bias_E, torch.tensor(bias), rtol=0, atol=1e-7)
    assert torch.equal(small.expert_bias_E, large.expert_bias_E)
    assert small.expert_bias_E.abs().max() > 2 * RATE


@pytest.mark.parametrize("kind", [ProportionalBalance, SmebuBalance])
def test_counts_are_exact_integers_also_where_fp32_has_none(kind: type[ProportionalBalance | SmebuBalance]) -> None:
    """Beyond 2^24, where fp32 would lose the difference; the error is (mean - count) / mean to fp32's last bit."""
    config = ProportionalBalanceConfig(bias_update_rate=1.0)
    rule = ProportionalBalance(config, ModelConfig(), ALONE)
    if kind is SmebuBalance:
        moe = MoeConfig(num_experts=EXPERTS)
        smebu = SmebuBalanceConfig(bias_update_rate=1.0, kappa=1.0, momentum=0.0)
        rule = SmebuBalance(smebu, ModelConfig(num_layers=2, moe=moe), ALONE)  # type: ignore[assignment]
    made = router()
    counts = torch.full((1, EXPERTS), 2**40)
    counts[0, 0] += 3
    counts[0, 1] -= 3
    rule.after_step([made], StepLoad(counts), START)
    # tanh is the identity here, and nothing but the two experts may move.
    assert made.expert_bias_E.tolist() == pytest.approx([-3 / 2**40, 3 / 2**40] + [0.0] * (EXPERTS - 2), abs=1e-17)


def test_a_step_without_tokens_moves_no_bias() -> None:
    made = router()
    rule = ProportionalBalance(ProportionalBalanceConfig(), ModelConfig(), ALONE)
    rule.after_step([made], StepLoad(torch.zeros(1, EXPERTS, dtype=torch.int64)), START)
    assert made.expert_bias_E.tolist() == [0.0] * EXPERTS


# ---- SMEBU -----------------------------------------------------------------------------------------------------------


def smebu_rule(**config: float | BiasScheduleConfig) -> SmebuBalance:
    model = ModelConfig(num_layers=3, moe=MoeConfig(num_experts=EXPERTS, top_k=3))
    return SmebuBalance(SmebuBalanceConfig(**config), model, ALONE)  # type: ignore[arg-type]


def plain_smebu(
    loads: list[list[int]], rate: float, kappa: float, beta: float, factors: list[float]
) -> tuple[list[float], list[float]]:
    """(bias, momentum) by the formulas of arXiv 2602.17004."""
    bias, momentum = [0.0] * EXPERTS, [0.0] * EXPERTS
    for counts, factor in zip(loads, factors, strict=True):
        mean = sum(counts) / EXPERTS
        update = centred([rate * math.tanh(kappa * (mean - count) / mean) for count in counts])
        momentum = [beta * m + (1 - beta) * d for m, d in zip(momentum, update, strict=True)]
        bias = [b + factor * m for b, m in zip(bias, momentum, strict=True)]
    return bias, momentum


@pytest.mark.parametrize("constants", [(5e-4, 2.0, 0.5), (1e-2, 0.3, 0.9), (1e-3, 5.0, 0.0)], ids=str)
def test_smebu_is_that_of_its_formulas(constants: tuple[float, float, float]) -> None:
    rate, kappa, beta = constants
    rule, routers = smebu_rule(bias_update_rate=rate, kappa=kappa, momentum=beta), [router(), router()]
    loads = [random_counts(step, layers=2) for step in range(25)]
    for counts_ME in loads:
        rule.after_step(routers, StepLoad(counts_ME), START)
    assert rule.state().keys() == {"momentum_ME"}
    for layer, made in enumerate(routers):
        bias, momentum = plain_smebu([c[layer].tolist() for c in loads], rate, kappa, beta, [1.0] * 25)
        torch.testing.assert_close(made.expert_bias_E, torch.tensor(bias), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(rule.state()["momentum_ME"][layer], torch.tensor(momentum), rtol=1e-4, atol=1e-8)


def test_smebu_has_the_published_constants() -> None:
    config = SmebuBalanceConfig()
    assert (config.bias_update_rate, config.kappa, config.momentum) == (5e-4, 2.0, 0.5)


def test_a_frozen_smebu_bias_rests_whatever_its_momentum() -> None:
    rule, made = smebu_rule(schedule=BiasScheduleConfig(warmup_steps=2, frozen_steps=2)), router()
    loads = [random_counts(step) for step in range(6)]
    biases = []
    for step, counts in enumerate(loads):
        rule.after_step([made, router()], StepLoad(counts.expand(2, -1)), replace(START, step=step, steps=6))
        biases.append(made.expert_bias_E.clone())
    expected, momentum = plain_smebu([c[0].tolist() for c in loads], 5e-4, 2.0, 0.5, [0.5, 1.0, 1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(biases[-1], torch.tensor(expected), rtol=1e-4, atol=1e-7)
    assert torch.equal(biases[3], biases[5])
    assert not torch.equal(biases[2], biases[3])
    torch.testing.assert_close(rule.state()["momentum_ME"][0], torch.tensor(momentum), rtol=1e-4, atol=1e-8)
