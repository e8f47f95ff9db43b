"""Configurations, their means over seeds, and differences, against plain formulas."""

import math

import pytest

from pipelines.errors import UserError
from tests.tuning.comparison.made import STEPS, TOKENS_PER_STEP, UNTRAINED, VALIDATE_EVERY, Made, folders, lr, many
from tuning.comparison.comparing import Comparison, compare_runs

# Student's t, two-sided 95 %, by degrees of freedom: from a printed table.
T = {1: 12.706, 2: 4.303}


def half_width(values: list[float]) -> float:
    n, mean = len(values), sum(values) / len(values)
    return T[n - 1] * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1)) / math.sqrt(n)


def compared(*made: Made) -> Comparison:
    return compare_runs(folders(*made), "a test")


def test_runs_that_differ_in_nothing_but_their_seed_are_one_configuration() -> None:
    found = compared(*many(lr("1e-3"), [3.0, 3.1], "a"), *many(lr("3e-3"), [2.9, 3.0], "b"))
    assert found.keys == ("optimizer.lr",)
    assert [[run.info.name for run in each.runs] for each in found.configurations] == [
        ["b-s0", "b-s1"],
        ["a-s0", "a-s1"],
    ]
    assert [each.name for each in found.configurations] == ["#1 lr 3e-3", "#2 lr 1e-3"]


def test_means_and_intervals_are_those_of_student() -> None:
    losses = [3.0, 3.1, 3.35]
    found = compared(*many(lr("1e-3"), losses, "a"), Made("b", lr("3e-3"), loss=9.0))
    loss = found.configurations[0].loss
    assert loss is not None
    assert loss.mean == pytest.approx(3.15)
    assert loss.high - loss.mean == pytest.approx(half_width(losses), rel=1e-3)


def test_differences_are_paired_by_seed() -> None:
    # Far apart from seed to seed, and always 0.1 +- 0.01 apart within one.
    found = compared(*many(lr("1e-3"), [3.0, 3.5, 4.0], "a"), *many(lr("3e-3"), [3.1, 3.61, 4.09], "b"))
    reference, other = found.configurations
    assert found.reference is reference
    difference = found.difference(other)
    assert difference.paired is not None
    assert difference.paired.mean == pytest.approx(0.1)
    assert difference.paired.high - difference.paired.mean == pytest.approx(half_width([0.1, 0.11, 0.09]), rel=1e-3)
    assert (difference.verdict, difference.words) == ("worse", "+0.1000 ± 0.0248, 3 seeds: worse")


def test_a_difference_that_changes_its_sign_is_within_noise() -> None:
    found = compared(*many(lr("1e-3"), [3.0, 3.1], "a"), *many(lr("3e-3"), [3.1, 3.05], "b"))
    assert found.difference(found.configurations[1]).verdict == "within noise"


def test_of_one_common_seed_one_cannot_tell() -> None:
    found = compared(
        *many(lr("1e-3"), [3.0, 3.1], "a"),
        Made("b", lr("3e-3"), seed=1, loss=3.3),
        Made("c", lr("1e-2"), seed=7, loss=3.4),
    )
    words = [found.difference(each).words for each in found.configurations]
    assert words == [
        "the reference",
        "+0.2500, one seed in common: cannot tell",
        "+0.3500, no seed in common: cannot tell",
    ]


def test_the_reference_is_the_best_of_those_with_the_most_seeds() -> None:
    found = compared(Made("lucky", lr("1e-2"), loss=2.0), *many(lr("1e-3"), [3.0, 3.1], "a"))
    assert [each.name for each in found.configurations] == ["#1 lr 0.01", "#2 lr 1e-3"]
    assert found.reference is found.configurations[1]


def test_a_reference_may_be_named() -> None:
    runs = folders(Made("a", lr("1e-3"), loss=3.0), Made("b", lr("3e-3"), loss=3.5))
    found = compare_runs(runs, "a test", runs[1])
    assert found.reference is not None
    assert found.reference.runs[0].info.name == "b"


def test_diverged_runs_are_finite_and_last() -> None:
    found = compared(
        Made("lost", lr("1.0"), lost_at=6),
        Made("half-s0", lr("0.3"), seed=0, loss=2.0),
        Made("half-s1", lr("0.3"), seed=1, lost_at=12),
        Made("cut", lr("0.1"), done=9),
        Made("poor", lr("1e-3"), loss=5.0),
    )
    assert [each.runs[0].info.name for each in found.configurations] == ["poor", "half-s0", "cut", "lost"]
    assert [found.difference(each).verdict for each in found.configurations] == [
        "reference",
        "cannot tell",
        "no loss",
        "no loss",
    ]
    assert found.difference(found.configurations[3]).words == "1 of 1 diverged"
    assert found.loss(found.configurations[3].runs[0]) is None
    # What it counts where a number is needed.
    assert found.last_loss == UNTRAINED


def test_a_run_that_did_all_its_steps_and_diverged_is_in_no_mean() -> None:
    found = compared(Made("a", seed=0, loss=3.0), Made("b", seed=1, loss=6.0))
    (only,) = found.configurations
    assert only.losses == {0: pytest.approx(3.0)}
    assert [found.loss(run) for run in only.runs] == [pytest.approx(3.0), None]
    assert [found.max_vio(run) for run in only.runs] == [pytest.approx(0.5), None]


def test_losses_are_compared_after_as_many_tokens_as_all_finished_runs_have_validated_after() -> None:
    long = Made("long", ("schedule.steps=40",), loss=2.0)
    found = compared(Made("short", loss=3.0), long, Made("cut", ("optimizer.lr=1e-2",), done=6))
    assert found.tokens == STEPS * TOKENS_PER_STEP
    by_name = {run.info.name: run for run in found.runs}
    # Step 20 of 40, on the line from 5.5 to 2.
    assert found.loss(by_name["long"]) == pytest.approx(UNTRAINED - 3.5 * 19 / 39)
    assert found.loss(by_name["short"]) == pytest.approx(3.0)
    assert found.loss(by_name["cut"]) is None


def test_where_no_run_has_finished_there_is_no_reference() -> None:
    found = compared(Made("a", done=9), Made("b", lr("1e-2"), done=12))
    assert found.reference is None
    assert found.tokens == 2 * VALIDATE_EVERY * TOKENS_PER_STEP


def test_a_seed_that_was_run_twice_counts_once() -> None:
    found = compared(Made("a", loss=3.0), Made("again", loss=3.2), Made("b", seed=1, loss=3.4))
    (only,) = found.configurations
    assert only.losses == pytest.approx({0: 3.1, 1: 3.4})


def test_keys_that_come_with_a_kind_are_not_listed_beside_it() -> None:
    found = compared(
        Made("a", ("stability.clip={kind: none}",)), Made("b", ("stability.clip={kind: global, max_norm: 1.0}",))
    )
    assert found.keys == ("stability.clip.kind",)
    assert found.short == {"stability.clip.kind": "clip"}
    third = Made("c", ("stability.clip={kind: global, max_norm: 0.5}",))
    assert compared(*[Made("a", ("stability.clip={kind: none}",)), Made("b"), third]).keys == (
        "stability.clip.kind",
        "stability.clip.max_norm",
    )


def test_another_text_is_another_configuration() -> None:
    found = compared(Made("a"), Made("b", dataset="f" * 64))
    assert found.keys == ("dataset",)
    assert len(found.configurations) == 2


def test_one_run_is_no_comparison() -> None:
    folder = Made("a").write()
    with pytest.raises(UserError, match="at least two runs"):
        compare_runs([folder, folder], "a test")
