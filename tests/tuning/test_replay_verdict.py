"""What is said of a treatment from what its trial has recorded."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.outcome import Ending
from pipelines.spool import TRAIN, VALIDATION, SpoolWriter
from tests.tuning.replayed import add_spike, write_run
from tuning.replay_plan import Plan, make_plan
from tuning.replay_verdict import Measured, best, cost, judge_replay, measure_replay

PLAIN = Measured(False, 1, 10.0, 9.0, 3.0, 3.1, (3.0, 9.0))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """The replay of steps 1 to 60, with the onset at 39 and the event at 40."""
    run = write_run(tmp_path / "spiky", "schedule.steps=100")
    add_spike(run, 40, onset=39)
    return make_plan(run, "1", ["half-lr"], 20, [])


def measured(plan: Plan, path: Path, losses: dict[int, float], outcome: str = "finished", *events: int) -> Measured:
    folder = write_run(path)
    with SpoolWriter(folder.spool) as writer:
        for step, loss in losses.items():
            writer.write(TRAIN, step, {"train/loss": loss, "train/grad_norm": 1.0, "spike/score_loss": 2 * loss})
        writer.write(VALIDATION, 60, {"val/loss": 2.5})
    for step in events:
        add_spike(folder, step)
    ending = Ending("diverged" if outcome == "diverged" else "finished", max(losses))
    return measure_replay(plan, folder, ending)


def test_the_spike_is_measured_from_its_onset_on_and_the_loss_at_the_end(tmp_path: Path, plan: Plan) -> None:
    losses = dict.fromkeys(range(1, 61), 4.0) | {20: 50.0, 39: 6.0, 40: 9.0} | dict.fromkeys(range(51, 61), 3.0)
    found = measured(plan, tmp_path / "trial", losses, "finished", 20, 40)
    assert (found.events, found.score, found.peak) == (1, 18.0, 9.0)
    assert (found.train_loss, found.val_loss, found.diverged) == (3.0, 2.5, False)
    assert found.figures()["replay/score"] == 18.0


@pytest.mark.parametrize("outcome", ["finished", "diverged"])
def test_what_is_not_finite_has_diverged_and_has_no_loss(tmp_path: Path, plan: Plan, outcome: str) -> None:
    losses = dict.fromkeys(range(1, 60), 3.0) | {58 if outcome == "finished" else 59: float("inf")}
    found = measured(plan, tmp_path / "trial", losses, outcome)
    assert found.diverged
    assert found.train_loss is None
    assert "replay/train_loss" not in found.figures()


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"events": 0, "score": 5.9}, "avoided"),
        ({"score": 8.0}, "smaller"),
        ({"score": 8.1}, "same"),
        ({"score": 12.4}, "same"),
        ({"score": 12.5}, "larger"),
        ({"score": None}, "same"),
        ({"diverged": True, "events": 0}, "diverged"),
        ({"losses": PLAIN.losses}, "no effect"),
    ],
)
def test_what_became_of_the_spike(change: dict[str, object], verdict: str) -> None:
    assert judge_replay(replace(PLAIN, **{"losses": (3.0, 8.9), **change}), PLAIN) == verdict  # type: ignore[arg-type]


def test_an_event_that_does_not_diverge_any_more_is_smaller() -> None:
    assert judge_replay(replace(PLAIN, losses=()), replace(PLAIN, diverged=True)) == "smaller"
    assert judge_replay(PLAIN, PLAIN) == "same"


def test_costs_are_differences_and_missing_where_a_loss_is() -> None:
    assert cost(3.5, 3.0) == 0.5
    assert cost(None, 3.0) is None
    assert best([None, 3.0, 2.0]) == 2.0
    assert best([None]) is None
