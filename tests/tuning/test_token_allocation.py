import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from tuning.token_allocation import complexity, spread

RNG = np.random.default_rng


def test_skipping_at_random_has_a_spread_of_one() -> None:
    experts = RNG(0).binomial(12, 0.6, 200_000)
    assert spread(experts.astype(np.int32), 12) == pytest.approx(1.0, abs=0.01)


def test_all_or_nothing_has_the_largest_spread() -> None:
    experts = np.array([0, 12] * 500, np.int32)
    # Variance 36 against 12 * 0.5 * 0.5.
    assert spread(experts, 12) == pytest.approx(math.sqrt(36 / 3))


@pytest.mark.parametrize("each", [0, 5, 12])
def test_the_same_number_for_every_token_has_no_spread(each: int) -> None:
    assert spread(np.full(100, each, np.int32), 12) == 0.0


def tokens(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids of very unequal frequency, and a loss for each token."""
    generator = RNG(seed)
    ids = np.minimum(generator.geometric(0.05, count), 300).astype(np.int32)
    return ids, generator.exponential(1.0, count).astype(np.float32)


@pytest.mark.parametrize("sign", [1, -1])
def test_experts_that_follow_the_loss_correlate_with_it(sign: int) -> None:
    ids, losses = tokens(20_000)
    experts = (100 + sign * np.argsort(np.argsort(losses)) // 200).astype(np.int32)
    assert complexity(ids, experts, losses) == pytest.approx(sign, abs=0.01)


def test_unrelated_experts_do_not() -> None:
    ids, losses = tokens(50_000)
    experts = RNG(1).integers(0, 5, len(ids)).astype(np.int32)
    assert abs(complexity(ids, experts, losses)) < 0.02


def test_frequency_alone_is_no_complexity() -> None:
    """Rare tokens are hard and get more experts, but inside a frequency there is nothing."""
    generator = RNG(2)
    ids = np.repeat(np.arange(1000, dtype=np.int32), generator.permutation(np.arange(1, 1001)) // 10 + 1)
    counts = np.bincount(ids)[ids]
    losses = (10 - np.log(counts) + 0.2 * generator.random(len(ids))).astype(np.float32)
    experts = (8 - 2 * np.log2(counts) + generator.integers(0, 3, len(ids)) + 10).astype(np.int32)
    over_all = float(spearmanr(experts, losses).statistic)
    assert over_all > 0.7
    assert complexity(ids, experts, losses) < 0.5 * over_all


def test_occurrences_of_a_token_are_kept_together() -> None:
    """One token is half of the text: what differs between it and others does not count."""
    ids = np.array([7] * 500 + list(range(100, 600)), np.int32)
    losses = np.where(ids == 7, 1.0, 2.0).astype(np.float32)
    experts = np.where(ids == 7, 1, 3).astype(np.int32)
    assert complexity(ids, experts, losses) == 0.0
