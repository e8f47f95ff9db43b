import itertools

import numpy as np
import pytest

from tuning.noise_floor import noise_floor, varying_noise_floor


def simulated(experts: int, top_k: int, tokens: int, draws: int = 600) -> float:
    """Token by token: every one takes the experts of its ``top_k`` least random numbers."""
    generator = np.random.default_rng(7)
    total = 0.0
    for _ in range(draws):
        chosen = np.argpartition(generator.random((tokens, experts)), top_k - 1, axis=1)[:, :top_k]
        load = np.bincount(chosen.ravel(), minlength=experts)
        total += load.max() / load.mean() - 1
    return total / draws


def enumerated(experts: int, top_k: int, tokens: int) -> float:
    """Over all ways in which the tokens can choose."""
    sets = list(itertools.combinations(range(experts), top_k))
    busiest = [
        max(sum(expert in chosen for chosen in choice) for expert in range(experts))
        for choice in itertools.product(sets, repeat=tokens)
    ]
    return float(np.mean(busiest)) * experts / (tokens * top_k) - 1


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (16, 2), (32, 4)])
def test_it_is_what_random_routing_has(experts: int, top_k: int) -> None:
    assert noise_floor(experts, top_k, 512) == pytest.approx(simulated(experts, top_k, 512), rel=0.05)


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(4, 2, 2), (4, 2, 4), (5, 3, 3), (3, 1, 5), (5, 4, 3)])
def test_it_is_exact_where_all_choices_can_be_counted(experts: int, top_k: int, tokens: int) -> None:
    assert noise_floor(experts, top_k, tokens) == pytest.approx(enumerated(experts, top_k, tokens), rel=0.05)


def test_four_times_the_tokens_halve_it() -> None:
    for tokens in (1024, 4096):
        assert noise_floor(16, 2, 4 * tokens) == pytest.approx(noise_floor(16, 2, tokens) / 2, rel=0.05)


def test_it_is_the_known_figure_for_the_usual_batch() -> None:
    # From 1500 draws, token by token.
    assert noise_floor(8, 2, 1024) == pytest.approx(0.0826, rel=0.03)
    assert noise_floor(32, 4, 1024) == pytest.approx(0.1775, rel=0.03)


def test_there_is_none_where_every_token_takes_every_expert() -> None:
    assert noise_floor(4, 4, 100) == 0
    assert noise_floor(1, 1, 100) == 0


def test_where_the_number_of_experts_varies_it_is_what_independent_choices_have() -> None:
    generator, total = np.random.default_rng(7), 0.0
    for _ in range(600):
        load = (generator.random((512, 16)) < 2.5 / 16).sum(axis=0)
        total += load.max() * 16 / (512 * 2.5) - 1
    assert varying_noise_floor(16, 2.5, 512) == pytest.approx(total / 600, rel=0.05)
