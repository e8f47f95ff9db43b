"""What must hold under every rule for a fixed number of experts: the bias decides who is chosen, no gate."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch

from moe.config.balance import BalanceConfig, BudgetBalanceConfig, NoBalanceConfig, ThresholdBalanceConfig
from moe.config.base import Config
from moe.config.model import Affinity, ModelConfig, MoeConfig
from moe.layers.router import Router, Routing
from moe.stability.balance import BALANCE
from moe.stability.technique import StepLoad
from tests.moe.build import ALONE
from tests.moe.stability.moments import START

EXPERTS, TOP_K, WIDTH, TOKENS, STEPS = 12, 3, 8, 160, 30
# Those that hold a number of experts by the level of their biases have files of their own.
ELSEWHERE = (NoBalanceConfig, BudgetBalanceConfig, ThresholdBalanceConfig)
RULES: list[type[Config]] = [kind for kind in get_args(get_args(BalanceConfig)[0]) if kind not in ELSEWHERE]
AFFINITIES: tuple[Affinity, ...] = ("sigmoid", "softmax", "sqrt_softplus")

every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.model_fields["kind"].default)
every_affinity = pytest.mark.parametrize("affinity", AFFINITIES)


def tokens(step: int) -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(step)) + 0.6


@functools.cache
@torch.no_grad()
def balanced(rule: type[Config], affinity: Affinity) -> tuple[Router, list[torch.Tensor]]:
    """A router that the rule has moved over steps of two micro-batches with padding, and its bias after each."""
    model = ModelConfig(num_layers=2, moe=MoeConfig(num_experts=EXPERTS, top_k=TOP_K, affinity=affinity))
    router = Router(WIDTH, model.moe)
    router.weight.normal_(generator=torch.Generator().manual_seed(0))
    # Rates that are felt within 30 steps: affinities of a softmax are about 1/12. Quantiles have none.
    rate = 4e-3 if affinity == "softmax" else 2e-2
    config = rule.model_validate({"bias_update_rate": rate} if "bias_update_rate" in rule.model_fields else {})
    technique = BALANCE[rule](config, model, ALONE)
    biases = []
    for step in range(STEPS):
        moment = replace(START, step=step, steps=STEPS)
        technique.before_step(moment)
        load_E = torch.zeros(EXPERTS, dtype=torch.int64)
        for x_TD in tokens(step).chunk(2):
            routing = router(x_TD, torch.arange(len(x_TD)) < len(x_TD) - 7)
            technique.after_forward([router], [routing])
            load_E += routing.load_E
        technique.after_step([router], StepLoad(load_E.unsqueeze(0)), moment)
        biases.append(router.expert_bias_E.clone())
    return router, biases


def by_expert(routing: Routing) -> torch.Tensor:
    """Gates [T, E], 0 where not chosen."""
    return torch.zeros_like(routing.affinity_TE).scatter(1, routing.ids_TK, routing.gates_TK).detach()


def routed_with(router: Router, bias_E: torch.Tensor) -> Routing:
    with torch.no_grad():
        router.expert_bias_E.copy_(bias_E)
        routing = router(tokens(1000))
    assert isinstance(routing, Routing)
    return routing


@every_affinity
@every_rule
def test_a_rule_evens_out_the_load_and_keeps_its_mean_at_zero(rule: type[Config], affinity: Affinity) -> None:
    router, biases = balanced(rule, affinity)
    assert all(abs(bias_E.double().mean().item()) < 1e-6 for bias_E in biases)
    vio = [float(r.load_E.max() / r.load_E.double().mean()) - 1 for r in unbiased_and_biased(router, biases)]
    assert vio[1] < 0.75 * vio[0]


def unbiased_and_biased(router: Router, biases: Sequence[torch.Tensor]) -> list[Routing]:
    return [routed_with(router, torch.zeros(EXPERTS)), routed_with(router, biases[-1])]


@every_affinity
@every_rule
def test_recentring_changes_no_choice_and_no_bit_of_a_gate(rule: type[Config], affinity: Affinity) -> None:
    """As if the mean had been left in: the same bias shifted by a constant."""
    router, biases = balanced(rule, affinity)
    unbiased, centred = unbiased_and_biased(router, biases)
    # Scores around 7 are rounded to 5e-7, which decides a choice that is closer than that.
    last_TK1 = (centred.affinity_TE + biases[-1]).topk(TOP_K + 1, dim=1).values
    clear_T = last_TK1[:, -2] - last_TK1[:, -1] > 2e-6
    assert clear_T.sum() > 0.98 * TOKENS
    for shift in (-3.0, -0.125, 0.5, 7.0):
        shifted = routed_with(router, biases[-1] + shift)
        assert torch.equal(shifted.ids_TK[clear_T], centred.ids_TK[clear_T])
        assert torch.equal(shifted.gates_TK[clear_T], centred.gates_TK[clear_T])
    assert not torch.equal(centred.ids_TK, unbiased.ids_TK), "the bias decides nothing here"


@every_affinity
@every_rule
def test_gates_keep_every_bit_where_the_chosen_experts_are_the_same(rule: type[Config], affinity: Affinity) -> None:
    router, biases = balanced(rule, affinity)
    before, after = routed_with(router, biases[-3]), routed_with(router, biases[-1])
    assert not torch.equal(biases[-3], biases[-1])
    gates = by_expert(before), by_expert(after)
    same_T = ((gates[0] > 0) == (gates[1] > 0)).all(dim=1)
    assert same_T.sum() > 20
    assert torch.equal(gates[0][same_T], gates[1][same_T])
    # Where a choice differs, each gate is still its affinity's share among those chosen, without any bias.
    chosen_TE = torch.where(gates[1] > 0, after.affinity_TE.detach().double(), 0.0)
    expected_TE = chosen_TE / chosen_TE.sum(dim=1, keepdim=True)
    torch.testing.assert_close(gates[1].double(), expected_TE, rtol=1e-5, atol=1e-7)
