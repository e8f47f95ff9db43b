"""Which answer an event gets, from config and journal alone."""

import pytest
from pydantic import ValidationError

from pipelines.errors import UserError
from pipelines.journal import Journal, LrCut
from pipelines.ladder import answer
from pipelines.loading import load_config
from pipelines.response_config import LadderResponseConfig, RecordResponseConfig
from pipelines.spike_event import Kind

LADDER = LadderResponseConfig(rungs=["record", "skip_step", "rewind_skip_samples", "rewind_lower_lr"], calm_steps=10)


def actions(kind: Kind, steps: list[int], config: LadderResponseConfig = LADDER) -> list[str]:
    """Answers to events at these steps, one after the other."""
    journal = Journal()
    found: list[str] = []
    for step in steps:
        given = answer(config, journal, kind, step)
        found.append(given.action)
        journal.rung, journal.last_event_step = given.next_rung, max(step, journal.last_event_step or 0)
    return found


def test_events_that_come_soon_climb_and_later_ones_begin_anew() -> None:
    assert actions("loss", [100, 110, 120, 131]) == ["record", "skip_step", "rewind_skip_samples", "record"]


def test_steps_that_are_repeated_after_a_rewind_belong_to_the_event_before() -> None:
    assert actions("loss", [100, 101, 102, 95, 96]) == [*LADDER.rungs, "abort"]


def test_what_is_not_finite_is_never_taken() -> None:
    assert actions("non_finite", [100, 101]) == ["skip_step", "rewind_skip_samples"]


def test_replicas_that_differ_are_answered_by_going_back_and_no_sample_is_to_blame() -> None:
    assert actions("replica_mismatch", [100, 101, 102]) == ["rewind", "rewind_lower_lr", "abort"]


def test_limits_of_the_run_outlast_the_ladder_and_are_named() -> None:
    journal = Journal(rewinds=[1, 2], skipped_steps=5)
    tight = LADDER.model_copy(update={"max_rewinds": 2, "max_skipped_steps": 5})
    assert answer(tight, journal, "loss", 10).action == "record"
    given = answer(tight, journal, "non_finite", 10)
    assert given.action == "abort"
    assert "response.max_rewinds, response.max_skipped_steps reached" in given.reason


def test_a_run_that_records_ends_for_what_is_not_finite_alone() -> None:
    assert answer(RecordResponseConfig(), Journal(), "loss", 7).action == "record"
    given = answer(RecordResponseConfig(), Journal(), "non_finite", 7)
    assert (given.action, given.reason) == ("abort", "loss or gradient was not finite at step 7")


def test_a_cut_learning_rate_rises_to_its_share_and_cuts_multiply() -> None:
    journal = Journal(lr_cuts=[LrCut(from_step=10, factor=0.5, rewarm_steps=3)])
    assert [journal.lr_factor(step) for step in (9, 10, 11, 12, 13, 99)] == [1.0, 0.125, 0.25, 0.375, 0.5, 0.5]
    journal.lr_cuts.append(LrCut(from_step=50, factor=0.5, rewarm_steps=0))
    assert [journal.lr_factor(step) for step in (49, 50)] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"snapshot_every_steps": 6, "guard_steps": 5}, r"more than 10 together"),
        ({"snapshot_every_steps": 1, "guard_steps": 9}, r"make snapshots at least 10"),
    ],
)
def test_snapshots_that_cannot_serve_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LadderResponseConfig.model_validate(values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["response.rungs=[rewind_anticipate]"], "needs stability.anticipation.kind=triggered"),
        (["stability.anticipation.kind=triggered"], "nothing triggers it: put rewind_anticipate into response.rungs"),
    ],
)
def test_anticipation_and_its_trigger_go_together(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(["micro"], settings)
    load_config(["micro"], ["response.rungs=[rewind_anticipate]", "stability.anticipation.kind=triggered"])


def test_going_back_with_nothing_changed_is_an_answer_too() -> None:
    config = LadderResponseConfig(rungs=["rewind", "skip_step"])
    assert actions("loss", [100, 100, 100], config) == ["rewind", "skip_step", "abort"]


def test_after_the_last_rung_a_run_may_go_on_with_what_is_finite() -> None:
    config = LadderResponseConfig(rungs=["skip_step"], after_last="record", calm_steps=10)
    assert actions("loss", [100, 105, 110, 130], config) == ["skip_step", "record", "record", "skip_step"]
    assert actions("non_finite", [100, 105], config) == ["skip_step", "abort"]


def test_with_the_default_distances_an_answer_never_loses_more_than_ten_steps() -> None:
    """A skip at the onset, then a rewind for the next step: for every place of the onset between two snapshots."""
    config = LadderResponseConfig()
    every, guard = config.snapshot_every_steps, config.guard_steps
    for onset in range(50, 50 + every):
        step = onset + 1
        newest = (step - 1) // every * every
        held = [newest - n * every for n in range(config.snapshots)]
        used = max(at for at in held if at <= onset - guard)
        assert step - used <= 10
