"""Findings in words, from runs whose effects are known."""

from dataclasses import replace
from itertools import product
from math import comb

import numpy as np
import pytest
from scipy.stats import fisher_exact

from tests.tuning.comparison.made import Made, folders, lr, many
from tuning.comparison.comparing import Comparison, compare_runs
from tuning.comparison.divergences import blind_chance, pattern_of_divergences
from tuning.comparison.effects import effects, splits
from tuning.comparison.findings import findings, headline


def compared(*made: Made) -> Comparison:
    return compare_runs(folders(*made), "a test")


RATES, WARMUPS = ("1e-4", "1e-3", "1e-2"), ("2", "4")


def grid(**lost: object) -> list[Made]:
    """Bias rates below 1e-3 leave MaxVio at 1.5; warm-up does nothing; seeds differ by 0.1 everywhere."""
    return [
        Made(
            f"r{rate}-w{warmup}-s{seed}",
            (f"stability.balance.bias_update_rate={rate}", f"schedule.warmup_steps={warmup}"),
            seed,
            loss=3.0 + 0.1 * seed + 0.001 * ((index * 7) % 5),
            max_vio=(1.5 if rate == "1e-4" else 0.4) + 0.01 * ((index * 3) % 4),
        )
        for index, (rate, warmup, seed) in enumerate(product(RATES, WARMUPS, range(3)))
    ]


def test_a_split_of_a_key_is_found_and_told_with_its_figures() -> None:
    first, *others = findings(compared(*grid()))
    assert first.startswith(
        "stability.balance.bias_update_rate 1e-4 leaves MaxVio at 1.51 after 10.2 k tokens, against 0.42"
    )
    assert "from 1e-3 on (difference 1.10 ± 0.02" in first
    assert first.endswith("6 blocks of runs that differ in it alone).")
    assert not any("bias_update_rate" in other for other in others)


def test_a_key_without_effect_is_told_with_what_it_is_at_most() -> None:
    last = findings(compared(*grid()))[-1]
    assert last.startswith(
        "schedule.warmup_steps (2, 4) makes no difference to the validation loss that 9 blocks of runs that differ in "
        "it alone can tell; it is at most 0.00"
    )


def test_the_effect_of_a_block_does_not_see_what_blocks_differ_in() -> None:
    found = compared(*many(lr("1e-3"), [3.0, 4.0, 5.0], "a"), *many(lr("3e-3"), [3.2, 4.21, 5.19], "b"))
    (effect,) = effects(found, found.loss)["optimizer.lr"]
    assert effect.blocks == 3
    assert effect.difference.mean == pytest.approx(0.2)
    assert effect.is_seen


def test_runs_that_differ_in_other_keys_too_are_compared_as_a_whole() -> None:
    made = [
        Made(f"m{n}", (f"optimizer.lr={1 + n}e-3", f"optimizer.beta2=0.{90 + n}"), n, 3.0 + n / 100) for n in range(4)
    ]
    found = effects(compared(*made), lambda run: run.seed * 1.0)["optimizer.lr"]
    assert [effect.blocks for effect in found] == [0, 0, 0]
    assert [effect.difference.mean for effect in found] == pytest.approx([2.0, 2.0, 2.0])
    assert [len(effect.runs) for effect in found] == [4, 4, 4]


def at_random(configurations: int, seeds: int) -> Comparison:
    """A random search over four keys, of which none does anything."""
    draw = np.random.default_rng(3)
    made = []
    for n in range(configurations):
        rate, decay, beta1, beta2 = draw.uniform(0.1, 0.9, 4)
        settings = (
            f"optimizer.lr={rate / 100:.5f}",
            f"optimizer.weight_decay={decay:.4f}",
            f"optimizer.beta1={beta1:.4f}",
            f"optimizer.beta2={beta2:.4f}",
        )
        made += [Made(f"m{n}-s{seed}", settings, seed) for seed in range(seeds)]
    return compared(*made)


@pytest.mark.parametrize("seeds", [1, 3])
def test_of_a_random_search_in_which_no_key_does_anything_little_is_told(seeds: int) -> None:
    found, draw = at_random(16, seeds), np.random.default_rng(1)
    told = 0
    for _ in range(100):
        # Seeds of a configuration are alike, as they are where something else about it matters.
        own = {each.number: draw.normal() for each in found.configurations}
        losses = {run.info.id: own[found.number_of[run.info.id]] + 0.2 * draw.normal() for run in found.runs}
        every = effects(found, lambda run, losses=losses: losses[run.info.id])  # type: ignore[misc]
        told += any(effect.is_seen for split in every.values() for effect in split)
    # 5 in 100 at most by right; more than 12 have a chance of one in a thousand then.
    assert told <= 12


def test_of_a_random_search_one_configuration_that_diverges_with_all_seeds_is_no_pattern() -> None:
    found = at_random(16, 3)
    seen = 0
    for each in found.configurations:
        lost = {run.info.id for run in each.runs}
        runs = tuple(replace(run, state="diverged") if run.info.id in lost else run for run in found.runs)
        pattern = pattern_of_divergences(replace(found, runs=runs))
        assert pattern is not None
        seen += pattern.is_seen
    assert seen == 0


def test_a_few_values_without_any_spread_are_no_certainty() -> None:
    # One spike more in each of two blocks: with nothing in it, that is what one pair in two does.
    few = compared(*many(lr("1e-3"), [3.0, 3.0], "a"), *many(lr("3e-3"), [3.0, 3.0], "b"))
    spikes = {run.info.id: float(run.settings["optimizer.lr"] == 3e-3) for run in few.runs}
    (effect,) = effects(few, lambda run: spikes[run.info.id])["optimizer.lr"]
    assert (effect.blocks, effect.difference.mean, effect.is_seen) == (2, 1.0, False)
    many_blocks = compared(*many(lr("1e-3"), [3.0] * 6, "a"), *many(lr("3e-3"), [3.0] * 6, "b"))
    spikes = {run.info.id: float(run.settings["optimizer.lr"] == 3e-3) for run in many_blocks.runs}
    (effect,) = effects(many_blocks, lambda run: spikes[run.info.id])["optimizer.lr"]
    assert (effect.blocks, effect.is_seen) == (6, True)


def test_keys_that_the_runs_cannot_tell_apart_are_both_named() -> None:
    quiet = many(("optimizer.lr=1e-3", "stability.clip.kind=none"), [3.0, 3.01, 3.02], "a")
    loud = [
        Made(f"b-s{seed}", ("optimizer.lr=3e-3", "stability.clip.kind=zclip"), 5 + seed, 4.0 + seed / 100)
        for seed in range(3)
    ]
    (sentence, *_) = findings(compared(*quiet, *loud))
    assert sentence.startswith(
        "optimizer.lr 3e-3 (in the same runs as stability.clip.kind zclip) has a validation loss of"
    )


def test_two_values_need_one_split_and_three_words_one_each() -> None:
    kinds = ("none", "zclip", "adagc")
    three = compared(*[Made(kind, (f"stability.clip.kind={kind}",)) for kind in kinds])
    assert [split.left.words for split in splits(three, "stability.clip.kind")] == [
        f"stability.clip.kind {kind}" for kind in kinds
    ]
    two = compared(*[Made(kind, (f"stability.clip.kind={kind}",)) for kind in kinds[:2]])
    assert len(splits(two, "stability.clip.kind")) == 1
    numbers = compared(*[Made(rate, lr(rate)) for rate in ("1e-3", "3e-3", "1e-2")])
    assert [(split.left.phrase, split.right.phrase) for split in splits(numbers, "optimizer.lr")] == [
        ("1e-3", "of 3e-3 and above"),
        ("below 0.01", "0.01"),
    ]


def diverging(rates: tuple[str, ...], clips: tuple[str, ...], lost: set[tuple[str, str]]) -> Comparison:
    return compared(
        *[
            Made(
                f"{rate}-{clip}-s{seed}",
                (f"optimizer.lr={rate}", f"stability.clip.kind={clip}"),
                seed,
                3.0 + 0.1 * seed,
                lost_at=7 if (rate, clip) in lost else None,
            )
            for rate, clip, seed in product(rates, clips, range(3))
        ]
    )


def test_what_diverges_is_told_by_one_key_where_one_is_enough() -> None:
    found = diverging(("1e-3", "3e-2"), ("none", "zclip"), {("3e-2", "none"), ("3e-2", "zclip")})
    assert findings(found)[0] == "optimizer.lr 0.03 diverged in 6 of 6 runs, all others in 0 of 6."


def test_what_diverges_is_told_by_two_keys_where_it_takes_both() -> None:
    found = diverging(("1e-3", "3e-3", "3e-2"), ("none", "zclip"), {("3e-2", "none")})
    assert (
        findings(found)[0]
        == "optimizer.lr 0.03 with stability.clip.kind none diverged in 3 of 3 runs, all others in 0 of 15."
    )


def test_divergences_that_may_be_chance_are_called_so() -> None:
    found = compared(Made("a", lr("1e-3")), Made("b", lr("3e-3")), Made("c", lr("1e-2"), lost_at=9))
    pattern = pattern_of_divergences(found)
    assert pattern is not None
    assert not pattern.is_seen
    assert findings(found)[0] == (
        "1 of 3 runs diverged; optimizer.lr 0.01 tells them best (1 of 1 runs, all others 0 of 2), which may be chance."
    )


def test_a_random_search_shows_what_diverges_and_has_few_splits() -> None:
    """40 rates of the learning rate, no two alike; the seven highest of those without a clip diverge."""
    made = [
        Made(
            f"m{n}",
            (f"optimizer.lr={(n + 1) * 1e-3:.3g}", f"stability.clip.kind={'none' if n % 2 else 'zclip'}"),
            lost_at=7 if n % 2 and n > 26 else None,
        )
        for n in range(40)
    ]
    found = compared(*made)
    bounds = [min(split.right.values) for split in splits(found, "optimizer.lr")]  # type: ignore[type-var]
    assert bounds == [0.005, 0.01, 0.014, 0.019, 0.023, 0.028, 0.032, 0.037]
    pattern = pattern_of_divergences(found)
    assert pattern is not None
    assert pattern.kind == "optimizer.lr of 0.028 and above with stability.clip.kind none"
    assert (pattern.diverged, pattern.runs, pattern.diverged_elsewhere, pattern.runs_elsewhere) == (7, 7, 0, 33)
    assert pattern.is_seen


@pytest.mark.parametrize(("inside", "drawn", "marked", "runs"), [(3, 3, 3, 12), (2, 5, 4, 11), (4, 6, 6, 9)])
def test_the_chance_of_divergences_is_that_of_fishers_test(inside: int, drawn: int, marked: int, runs: int) -> None:
    table = [[inside, drawn - inside], [marked - inside, runs - drawn - marked + inside]]
    assert blind_chance(inside, drawn, marked, runs) == pytest.approx(fisher_exact(table, "greater").pvalue)
    assert blind_chance(3, 3, 3, 12) == 1 / comb(12, 3)


def test_with_nothing_to_tell_that_is_said() -> None:
    found = compared(Made("a", lr("1e-3"), loss=3.0), Made("b", lr("3e-3"), loss=3.3))
    assert findings(found) == ["No effect of a key can be told from noise with these 2 runs of 2 configurations."]


def test_the_headline_counts_what_can_be_told() -> None:
    found = compared(
        *many(lr("1e-3"), [3.0, 3.1], "a"),
        *many(lr("3e-3"), [3.5, 3.6], "b"),
        Made("c", lr("1e-2"), loss=3.2),
        Made("d", lr("1.0"), lost_at=5),
    )
    assert headline(found) == (
        "6 runs of 4 configurations, 1 diverged; compared with #1 (optimizer.lr 1e-3): validation loss 3.0500 ± 0.6353 "
        "nats per token (2 seeds); of 3 others 1 worse beyond noise, 1 not to be told (too few seeds in common), "
        "1 without a loss."
    )


def test_where_nothing_has_finished_the_headline_says_so() -> None:
    found = compared(Made("a", lr("1e-3"), done=9), Made("b", lr("3e-3"), lost_at=9))
    assert headline(found) == (
        "2 runs of 2 configurations, 1 diverged; none has finished, so there is nothing to rank."
    )
