"""Where runs are compared that mostly never came to the end, and what is said of it: hand-made cases."""

import math
from itertools import product

import pytest
from scipy.stats import t

from tests.tuning.comparison.made import STEPS, TOKENS_PER_STEP, UNTRAINED, Made, folders, lr
from tuning.comparison.caveats import caveats, matching
from tuning.comparison.comparing import Comparison, compare_runs
from tuning.comparison.early import early_point
from tuning.comparison.findings import findings
from tuning.comparison.table import configurations_sheet, runs_sheet

RUNG = 5
"""The step of the first validation."""


def compared(*made: Made) -> Comparison:
    return compare_runs(folders(*made), "a test")


def with_loss_at_rung(loss: float) -> float:
    """The loss at the end of a made run that has ``loss`` at the rung: they fall along a line from step 1."""
    return UNTRAINED + (loss - UNTRAINED) * (STEPS - 1) / (RUNG - 1)


def stopped(*at_steps: int | None, **same: object) -> list[Made]:
    """Runs of as many rates that were ended at these steps; None came to its end."""
    return [
        Made(f"r{number}", lr(f"{number + 1}e-4"), done=step, **same)  # type: ignore[arg-type]
        for number, step in enumerate(at_steps)
    ]


@pytest.mark.parametrize(
    ("at_steps", "point"),
    [
        ((5, 5, 5, 5, 10, 10, 10, 10, None, None), (5, 10, 2)),  # later ones are the chosen ones
        ((7, 12, 12, 13, 14), (5, 5, 0)),
        ((7, *[12] * 9), (10, 9, 0)),  # one that was stopped before does not count
        ((3, *[12] * 9), (10, 9, 0)),  # nor one without a validation
        ((5, 5, 5, None, None, None), (5, 6, 3)),
        ((5, 5, None, None, None), None),  # most came to the end
        ((3, 3, 3, None), None),  # nobody else has validated
        ((None, None), None),
    ],
)
def test_the_point_is_the_last_that_nearly_all_have_validated_at(
    at_steps: tuple[int | None, ...], point: tuple[int, int, int] | None
) -> None:
    found = early_point(compared(*stopped(*at_steps)))
    if point is None:
        assert found is None
        return
    assert found is not None
    assert (found.tokens // TOKENS_PER_STEP, len(found.runs), found.finished) == point


def test_diverged_runs_have_no_part_in_it() -> None:
    lost = [Made(f"lost{number}", lr(f"{number + 1}e-2"), lost_at=7) for number in range(3)]
    runs = compared(*stopped(12, 12, 12), *lost)
    found = early_point(runs)
    assert found is not None
    assert (found.tokens, len(found.runs)) == (10 * TOKENS_PER_STEP, 3)
    assert [found.loss(run) for run in runs.diverged] == [None] * 3


def test_the_end_of_a_short_run_is_not_on_the_way() -> None:
    longer = [Made(f"long{number}", ("schedule.steps=40", *lr(f"{number + 1}e-3")), done=32) for number in range(3)]
    found = early_point(compared(Made("short"), *longer))
    assert found is not None
    assert found.after == "after 7.7 k of 10.2 k to 20.5 k tokens"
    assert (found.tokens, len(found.runs), found.finished) == (15 * TOKENS_PER_STEP, 4, 1)


@pytest.mark.parametrize(("finished", "pruned"), [(1, 6), (4, 8)])
def test_further_seeds_of_the_winners_have_no_part_in_it(finished: int, pruned: int) -> None:
    # They were run because they did well: with them a rate would be judged by its best, and with four finalists most of
    # the runs would have come to the end.
    every = finished + pruned
    again = [Made(f"r{n}-s{seed}", lr(f"{n + 1}e-4"), seed) for n in range(finished) for seed in (1, 2)]
    found = early_point(compared(*stopped(*[None] * finished, *[7] * pruned), *again))
    assert found is not None
    assert {run.info.name for run in found.runs} == {f"r{number}" for number in range(every)}
    assert found.finished == finished


def pruned(steps: tuple[float, ...] = (0.20, 0.22, 0.24, 0.26, 0.28, 0.30)) -> list[Made]:
    """Two rates, two warm-ups and three seeds: at the rung the higher rate is worse by one of ``steps`` in each of the
    six blocks, a long warm-up by 0.1; three runs of the best configuration came to the end."""
    excess = iter(steps)
    made = []
    for warmup, seed in product((2, 4), range(3)):
        for rate in ("1e-3", "3e-3"):
            loss = 5.0 + 0.02 * seed + (0.1 if warmup == 4 else 0.0) + (next(excess) if rate == "3e-3" else 0.0)
            settings = (*lr(rate), f"schedule.warmup_steps={warmup}")
            done = None if (rate, warmup) == ("1e-3", 2) else RUNG
            made.append(Made(f"r{rate}-w{warmup}-s{seed}", settings, seed, with_loss_at_rung(loss), done=done))
    return made


def test_an_early_effect_is_told_as_such_and_that_of_a_warm_up_is_not() -> None:
    # By hand: three splits are looked at, rate and warm-up at the end and the rate early, so that the interval over six
    # blocks is one of 1 - 0.05 / 3. The values 0.20 to 0.30 in steps of 0.02 have a variance of 0.0014.
    half = t.ppf(1 - 0.05 / 3 / 2, 5) * math.sqrt(0.0014 / 6)
    assert findings(compared(*pruned())) == [
        "Early only (after 2.6 k of 10.2 k tokens, 12 runs of which 3 finished): optimizer.lr 3e-3 has a validation "
        f"loss of 5.3200, against 5.0700 with 1e-3 (difference 0.2500 ± {half:.4f}, 6 blocks of runs that differ in it "
        "alone); that need not hold at the end."
    ]


def test_an_early_effect_within_the_noise_of_all_that_was_looked_at_is_not_told() -> None:
    # A mean of 0.0583 with a standard error of 0.02: t is 2.92, beyond the 2.57 of 95 % and within the 3.53 of a third.
    steps = (0.0, 0.02, 0.06, 0.06, 0.08, 0.13)
    mean = sum(steps) / 6
    error = math.sqrt(sum((step - mean) ** 2 for step in steps) / 5 / 6)
    assert t.ppf(1 - 0.05 / 2, 5) < mean / error < t.ppf(1 - 0.05 / 3 / 2, 5)
    assert findings(compared(*pruned(steps))) == [
        "No effect of a key can be told from noise with these 12 runs of 4 configurations, neither at the end nor "
        "after 2.6 k of 10.2 k tokens."
    ]


def test_effects_at_the_end_come_first_and_survivors_say_of_no_key_that_it_does_nothing() -> None:
    """All of zclip were pruned at a loss 0.1 higher; of those that finished the rate decides, and beta2 does nothing.

    Early the rate is seen still more clearly than the clip, but nothing is told of it twice."""
    made = []
    for rate, beta2, clip, seed in product(("1e-3", "3e-3"), ("0.9", "0.95"), ("none", "zclip"), range(3)):
        noise = 0.001 * ((seed + (rate == "3e-3") + (beta2 == "0.9")) % 3)
        end = 3.0 + 0.1 * seed + (0.4 if rate == "3e-3" else 0.0) + noise
        early = UNTRAINED + (end - UNTRAINED) * (RUNG - 1) / (STEPS - 1) + 0.1 + 0.01 * seed
        settings = (*lr(rate), f"optimizer.beta2={beta2}", f"stability.clip.kind={clip}")
        loss = end if clip == "none" else with_loss_at_rung(early)
        name = f"r{rate}-b{beta2}-{clip}-s{seed}"
        made.append(Made(name, settings, seed, loss, done=None if clip == "none" else RUNG))
    first, second = findings(compared(*made))
    assert first.startswith("optimizer.lr 3e-3 has a validation loss of 3.50")
    assert "after 10.2 k tokens, against 3.10" in first
    assert second.startswith(
        "Early only (after 2.6 k of 10.2 k tokens, 24 runs of which 12 finished): stability.clip.kind zclip has a "
    )
    assert "difference 0.11" in second


def test_tables_and_words_of_the_report_have_the_early_loss_beside_that_of_the_end() -> None:
    found = compared(*pruned())
    heading = "validation loss after 2.6 k of 10.2 k tokens"
    sheet = configurations_sheet(found)
    early, end = sheet.headings.index(heading), sheet.headings.index("validation loss")
    # Over seeds 0, 1 and 2: 5.00, 5.02 and 5.04 with the best.
    half = t.ppf(0.975, 2) * 0.02 / math.sqrt(3)
    assert sheet.texts[0][early] == f"5.020 ± {half:.3f}"
    assert [row[end] for row in sheet.texts[1:]] == ["–"] * 3
    rows = runs_sheet(found)
    losses = [row[rows.headings.index(heading)] for row in rows.texts]
    assert (losses[:3], len(losses)) == (["5.0000", "5.0200", "5.0400"], 12)
    assert heading not in configurations_sheet(compared(*stopped(None, None))).headings
    assert "“Early only” is of the last point that nearly all have validated at (after 2.6 k of" in matching(found)
    assert "Early only" not in matching(compared(*stopped(None, None)))
    assert any(each.endswith("differences at the end are among survivors.") for each in caveats(found))
