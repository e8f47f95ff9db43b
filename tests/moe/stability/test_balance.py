"""The sign rule against the paper's formula written out, and what recentring must and must not change."""

from dataclasses import replace

import torch

from moe.config.balance import SignBalanceConfig
from moe.config.model import ModelConfig, MoeConfig
from moe.layers.router import Router
from moe.stability.balance import SignBalance
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
