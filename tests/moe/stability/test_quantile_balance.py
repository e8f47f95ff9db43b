"""Quantile balancing against exact quantiles of all tokens, taken by sorting in plain Python."""

import math
from dataclasses import replace

import pytest
import torch

from moe.config.balance import BiasScheduleConfig, QuantileBalanceConfig
from moe.config.model import Affinity, ModelConfig, MoeConfig
from moe.layers.router import Router
from moe.schedule import Moment
from moe.stability.quantile_balance import BINS, FINEST, QuantileBalance, margin_edges
from moe.stability.technique import StepLoad
from tests.moe.build import ALONE
from tests.moe.stability.moments import START

EXPERTS, TOP_K, WIDTH, TOKENS = 12, 3, 8, 480
KINDS: tuple[Affinity, ...] = ("sigmoid", "softmax", "sqrt_softplus")


def width_at(affinity: Affinity, margin: float) -> float:
    """The stated width of the bin that holds this margin."""
    step = 0.08 if affinity == "sqrt_softplus" else 0.06
    return step * math.exp(step) * (abs(margin) + FINEST)


def setting(affinity: Affinity, scale: float = 1.0) -> tuple[ModelConfig, Router, torch.Tensor]:
    """A router and tokens with something in common, which makes some experts far more wanted than others."""
    model = ModelConfig(num_layers=2, moe=MoeConfig(num_experts=EXPERTS, top_k=TOP_K, affinity=affinity))
    generator = torch.Generator().manual_seed(0)
    router = Router(WIDTH, model.moe)
    with torch.no_grad():
        router.weight.normal_(generator=generator).mul_(scale)
    return model, router, torch.randn(TOKENS, WIDTH, generator=generator) + 0.6


@torch.no_grad()
def update(
    rule: QuantileBalance, router: Router, parts: list[tuple[torch.Tensor, torch.Tensor | None]], moment: Moment = START
) -> torch.Tensor:
    """One step over micro-batches of (tokens, which of them are real); its load [E]."""
    rule.before_step(moment)
    load_E = torch.zeros(EXPERTS, dtype=torch.int64)
    for x_TD, real_T in parts:
        routing = router(x_TD, real_T)
        load_E += routing.load_E
        rule.after_forward([router], [routing])
    rule.after_step([router], StepLoad(load_E.unsqueeze(0)), moment)
    return load_E


def max_vio(load_E: torch.Tensor) -> float:
    return float(load_E.max() / load_E.double().mean() - 1)


def plain_betas(affinity_TE: list[list[float]], beta: list[float]) -> list[float]:
    """The formulas with exact quantiles: the ceil(T (1 - k/n))-th smallest of ``s_ij - alpha_i``; not recentred."""
    margins: list[list[float]] = [[] for _ in range(EXPERTS)]
    for row in affinity_TE:
        biased = sorted((s - b for s, b in zip(row, beta, strict=True)), reverse=True)
        alpha = biased[TOP_K]
        for expert, s in enumerate(row):
            margins[expert].append(s - alpha)
    rank = math.ceil(len(affinity_TE) * (EXPERTS - TOP_K) / EXPERTS)
    return [sorted(values)[rank - 1] for values in margins]


@pytest.mark.parametrize("affinity", KINDS)
@pytest.mark.parametrize("scale", [0.02, 1.0, 4.0])
def test_betas_are_the_exact_quantiles_within_a_bin(affinity: Affinity, scale: float) -> None:
    """Over micro-batches with padding; three updates, each from where the last one led."""
    model, router, x_TD = setting(affinity, scale)
    rule = QuantileBalance(QuantileBalanceConfig(), model, ALONE)
    real_T = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1)) < 0.8
    rows = (slice(0, 200), slice(200, 280), slice(280, TOKENS))
    for _ in range(3):
        before = router.expert_bias_E.tolist()
        # The affinities themselves are compared elsewhere; here the router's own, so that only quantiles differ.
        affinity_TE = router(x_TD).affinity_TE[real_T].double().tolist()
        update(rule, router, [(x_TD[r], real_T[r]) for r in rows])
        exact = plain_betas(affinity_TE, [-b for b in before])
        # An estimate lies in the bin of the exact margin; recentring mixes in the errors of all experts.
        widths = [width_at(affinity, beta + bias) for beta, bias in zip(exact, before, strict=True)]
        mean = sum(exact) / EXPERTS
        for expert, bias in enumerate(router.expert_bias_E.tolist()):
            allowed = widths[expert] + sum(widths) / EXPERTS + 2e-6
            assert abs(-bias - (exact[expert] - mean)) <= allowed, expert
        assert abs(router.expert_bias_E.double().mean().item()) < 1e-7


@pytest.mark.parametrize("affinity", KINDS)
def test_bins_are_no_wider_than_stated_and_reach_as_far(affinity: Affinity) -> None:
    edges = margin_edges(affinity).double()
    limit = 128 if affinity == "sqrt_softplus" else 2
    assert len(edges) == BINS + 1
    assert edges[0] == -limit
    assert edges[-1] == limit
    assert edges[BINS // 2] == 0
    nearest = torch.minimum(edges[1:].abs(), edges[:-1].abs())
    stated = [width_at(affinity, distance) for distance in nearest.tolist()]
    assert ((edges[1:] - edges[:-1]) <= torch.tensor(stated).double()).all()


@pytest.mark.parametrize("affinity", KINDS)
def test_a_few_updates_balance_a_load_that_stays_as_it_is(affinity: Affinity) -> None:
    model, router, x_TD = setting(affinity)
    rule = QuantileBalance(QuantileBalanceConfig(), model, ALONE)
    vios = [max_vio(update(rule, router, [(x_TD, None)])) for _ in range(12)]
    assert vios[0] > 0.8
    assert vios[-1] < 0.1
    # The bias that evens out one half of the tokens is not fitted to them: it does so for the other.
    model, router, x_TD = setting(affinity)
    for _ in range(12):
        update(rule, router, [(x_TD[::2], None)])
    assert max_vio(router(x_TD[1::2]).load_E) < 0.35


def test_tokens_are_routed_by_the_old_beta() -> None:
    model, router, x_TD = setting("sigmoid")
    rule = QuantileBalance(QuantileBalanceConfig(), model, ALONE)
    unbiased = router(x_TD).load_E
    assert torch.equal(update(rule, router, [(x_TD[:200], None), (x_TD[200:], None)]), unbiased)
    assert not torch.equal(router(x_TD).load_E, unbiased)


@pytest.mark.parametrize("smoothing", [0.25, 0.9])
def test_smoothing_keeps_its_share_of_the_old_bias(smoothing: float) -> None:
    biases = []
    for share in (0.0, smoothing):
        model, router, x_TD = setting("sigmoid")
        with torch.no_grad():
            router.expert_bias_E.copy_(torch.linspace(-0.2, 0.2, EXPERTS))
        update(QuantileBalance(QuantileBalanceConfig(smoothing=share), model, ALONE), router, [(x_TD, None)])
        biases.append(router.expert_bias_E.clone())
    expected = smoothing * torch.linspace(-0.2, 0.2, EXPERTS) + (1 - smoothing) * biases[0]
    torch.testing.assert_close(biases[1], expected, rtol=0, atol=1e-6)


def test_what_padding_holds_and_an_earlier_step_do_not_count() -> None:
    model, router, x_TD = setting("sigmoid")
    rule = QuantileBalance(QuantileBalanceConfig(), model, ALONE)
    update(rule, router, [(x_TD[:300], None)])
    padding = 40 * torch.ones(60, WIDTH)
    real_T = torch.arange(TOKENS + 60) < TOKENS
    update(rule, router, [(torch.cat((x_TD, padding)), real_T)])
    fresh = QuantileBalance(QuantileBalanceConfig(), model, ALONE)
    _, other, _ = setting("sigmoid")
    update(fresh, other, [(x_TD[:300], None)])
    update(fresh, other, [(x_TD, None)])
    assert torch.equal(router.expert_bias_E, other.expert_bias_E)


def test_a_step_of_nothing_but_padding_moves_no_bias() -> None:
    model, router, x_TD = setting("sigmoid")
    update(QuantileBalance(QuantileBalanceConfig(), model, ALONE), router, [(x_TD, torch.zeros(TOKENS) > 0)])
    assert router.expert_bias_E.tolist() == [0.0] * EXPERTS


def test_a_frozen_bias_rests() -> None:
    model, router, x_TD = setting("sigmoid")
    config = QuantileBalanceConfig(schedule=BiasScheduleConfig(frozen_steps=1))
    rule = QuantileBalance(config, model, ALONE)
    update(rule, router, [(x_TD[:300], None)], replace(START, step=8, steps=10))
    before = router.expert_bias_E.clone()
    update(rule, router, [(x_TD, None)], replace(START, step=9, steps=10))
    assert before.any()
    assert torch.equal(before, router.expert_bias_E)
