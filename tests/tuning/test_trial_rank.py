"""Trials that follow each other in one process: each is the run that it would be alone."""

import gc
import math
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines.config import RunConfig
from pipelines.outcome import Ending
from pipelines.run_folder import RunFolder
from pipelines.run_lock import is_written_to
from tests.distributed import run_distributed
from tests.tuning.jobs import ABSURD, OTHER, PAIR, Recorded, by_the_loop, losses_in_series, recorded, rounded, trial_job
from tuning.outcome import measure_trial
from tuning.recording import read_series
from tuning.trial_rank import Progress, TrialJob, TrialRank, reset_process


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))


@pytest.fixture(autouse=True)
def _process() -> Iterator[None]:
    """Nothing is left behind for the tests after these."""
    yield
    reset_process()
    gc.unfreeze()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """What the plain loop records of a trial's config."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEADYMOE_HOME", str(folder / "home"))
        return by_the_loop(folder / "run")


def _run(rank: TrialRank, job: TrialJob) -> Ending:
    """A trial from its first step to its end, as Tune has it run: some steps at a time."""
    rank.begin(job)
    while (progress := rank.advance(5)).ending is None:
        pass
    return progress.ending


def test_a_trial_is_the_run_that_the_loop_makes_of_its_config_whatever_ran_before_it(
    tmp_path: Path, alone: Recorded
) -> None:
    rank = TrialRank(0)
    for name, settings in {"a": (), "b": OTHER, "again": ()}.items():
        assert _run(rank, trial_job(tmp_path / name, *settings)) == Ending("finished", 12)
    assert recorded(tmp_path / "a") == alone
    assert recorded(tmp_path / "again") == recorded(tmp_path / "a")
    assert recorded(tmp_path / "b") == by_the_loop(tmp_path / "b-alone", *OTHER)
    assert recorded(tmp_path / "b")["train"][1] != recorded(tmp_path / "a")["train"][1]


class Cycle:
    """What only a collection frees."""

    def __init__(self) -> None:
        self.myself = self


def test_a_trial_leaves_nothing_behind_and_its_end_does_not_look_through_the_whole_process(tmp_path: Path) -> None:
    rank, kept = TrialRank(0), []
    for number in range(4):
        rank.begin(trial_job(tmp_path / str(number)))
        kept.append(gc.get_freeze_count())
        # The first step of a process imports more. All modules of torch are some 300,000 objects.
        assert number == 0 or len(gc.get_objects()) < 30_000
        rank.advance(1)
        cycle = Cycle()
        gone = weakref.ref(cycle)
        del cycle
        assert gone() is not None
        rank.begin(trial_job(tmp_path / f"{number}-next"))
        assert gone() is None
    assert kept[3] - kept[2] < 1000


@pytest.mark.slow
def test_two_ranks_that_keep_their_groups_are_the_loop_on_two_ranks(tmp_path: Path) -> None:
    jobs = [trial_job(tmp_path / name, *PAIR, *more) for name, more in {"a": (), "b": OTHER, "again": ()}.items()]
    endings = run_distributed(_run_all, 2, jobs)
    assert endings == [[Ending("finished", 12)] * 3] * 2
    alone = by_the_loop(tmp_path / "alone", "parallel.expert_parallel=2", workers=2)
    assert recorded(tmp_path / "a") == recorded(tmp_path / "again") == alone
    assert recorded(tmp_path / "b") == by_the_loop(
        tmp_path / "b-alone", "parallel.expert_parallel=2", *OTHER, workers=2
    )


def _run_all(rank: int, world: int, jobs: list[TrialJob]) -> list[Ending]:
    trial_rank = TrialRank(rank)
    return [_run(trial_rank, job) for job in jobs]


def test_a_trial_that_is_left_midway_frees_its_folder_and_can_be_begun_again(tmp_path: Path, alone: Recorded) -> None:
    left, other = trial_job(tmp_path / "left"), trial_job(tmp_path / "other", *OTHER)
    rank = TrialRank(0)
    rank.begin(left)
    assert rank.advance(3) == Progress(3)
    assert is_written_to(RunFolder(tmp_path / "left"))
    rank.close()
    assert not is_written_to(RunFolder(tmp_path / "left"))
    rank.begin(left)
    rank.advance(6)
    rank.begin(other)
    assert not is_written_to(RunFolder(tmp_path / "left"))
    assert _run(TrialRank(0), left) == Ending("finished", 12)
    assert recorded(tmp_path / "left") == alone


def test_a_trial_that_goes_on_from_a_checkpoint_has_the_series_of_an_undisturbed_one(tmp_path: Path) -> None:
    job = trial_job(tmp_path / "cut", "checkpoint.every_steps=4")
    killed = TrialRank(0)
    killed.begin(job)
    killed.advance(10)
    killed.close()
    # As a kill leaves it: written in part, and not told to anybody.
    assert sorted(path.name for path in RunFolder(tmp_path / "cut").checkpoints.iterdir())[-1] == "step-00000008"
    assert _run(TrialRank(0), job) == Ending("finished", 12)
    whole = by_the_loop(tmp_path / "whole", "checkpoint.every_steps=4")
    assert losses_in_series(tmp_path / "cut") == rounded(whole["train"])
    series = read_series(RunFolder(tmp_path / "cut"))
    assert series.validation["val/loss"] == pytest.approx(whole["validation"][12]["val/loss"], rel=1e-5)


def test_a_trial_killed_between_its_end_and_its_word_of_it_has_its_series_all_the_same(tmp_path: Path) -> None:
    job = trial_job(tmp_path / "ended", "checkpoint.at_end=true")
    _run(TrialRank(0), job)
    first = read_series(RunFolder(tmp_path / "ended"))
    assert _run(TrialRank(0), job) == Ending("finished", 12)
    assert read_series(RunFolder(tmp_path / "ended")) == first


def test_a_start_that_cannot_be_trained_ends_as_refused_and_harms_nobody(tmp_path: Path, alone: Recorded) -> None:
    rank = TrialRank(0)
    ending = _run(rank, trial_job(tmp_path / "refused", "model.init.std=1.0e+30"))
    assert (ending.outcome, ending.step) == ("refused", 0)
    assert "before the first step" in (ending.reason or "")
    assert not is_written_to(RunFolder(tmp_path / "refused"))
    _run(rank, trial_job(tmp_path / "next"))
    assert recorded(tmp_path / "next") == alone


def test_a_trial_that_diverges_ends_there_and_harms_nobody(tmp_path: Path, alone: Recorded) -> None:
    rank = TrialRank(0)
    ending = _run(rank, trial_job(tmp_path / "absurd", *ABSURD))
    assert ending.outcome == "diverged"
    assert ending.step <= 3
    series = read_series(RunFolder(tmp_path / "absurd"))
    assert (series.outcome, series.steps, len(series.train["train/loss"])) == ("diverged", 12, ending.step)
    _run(rank, trial_job(tmp_path / "next"))
    assert recorded(tmp_path / "next") == alone


def test_modes_of_the_process_that_somebody_left_behind_are_put_back(tmp_path: Path) -> None:
    rank = TrialRank(0)
    _run(rank, trial_job(tmp_path / "before"))
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.rand(3)
    _run(rank, trial_job(tmp_path / "after"))
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert recorded(tmp_path / "after") == recorded(tmp_path / "before")


def test_a_trial_that_begins_with_another_run_s_checkpoint_takes_the_same_steps_and_ends_where_it_is_told(
    tmp_path: Path,
) -> None:
    _run(TrialRank(0), trial_job(tmp_path / "run"))
    checkpoint = str(RunFolder(tmp_path / "run").checkpoints / "step-00000004")
    job = trial_job(tmp_path / "trial", "checkpoint.every_steps=0", "validation.every_steps=7")
    job |= {"checkpoint": checkpoint, "until_step": 7}
    assert _run(TrialRank(0), job) == Ending("finished", 7)
    run, trial = recorded(tmp_path / "run"), recorded(tmp_path / "trial")
    assert trial["train"] == {step: run["train"][step] for step in (5, 6, 7)}
    assert trial["validation"].keys() == {7}
    assert not is_written_to(RunFolder(tmp_path / "trial"))


def test_what_begins_anew_is_not_taken_from_the_checkpoint(tmp_path: Path) -> None:
    """Moments of 0 with their correction begun anew: the first update is that of signs, as at the first step of all."""
    _run(TrialRank(0), trial_job(tmp_path / "run"))
    checkpoint = str(RunFolder(tmp_path / "run").checkpoints / "step-00000004")
    short: TrialJob = {**trial_job(tmp_path / "moments"), "checkpoint": checkpoint, "until_step": 6}
    _run(TrialRank(0), {**short, "fresh": ["optimizer."]})
    run, moments = recorded(tmp_path / "run")["train"], recorded(tmp_path / "moments")["train"]
    assert moments[5]["train/loss"] == run[5]["train/loss"]
    rates = {name: steps[step]["train/lr"] for name, steps, step in (("run", run, 1), ("fresh", moments, 5))}
    first, fresh = run[1]["train/update_norm"] / rates["run"], moments[5]["train/update_norm"] / rates["fresh"]
    assert fresh == pytest.approx(first, rel=0.05)
    assert moments[6]["train/loss"] != run[6]["train/loss"]


def test_a_technique_that_the_run_did_not_have_begins_without_a_past(tmp_path: Path) -> None:
    _run(TrialRank(0), trial_job(tmp_path / "run"))
    checkpoint = str(RunFolder(tmp_path / "run").checkpoints / "step-00000004")
    other = trial_job(tmp_path / "zclip", "stability.clip={kind: zclip, warmup_steps: 2}")
    job: TrialJob = {**other, "checkpoint": checkpoint, "until_step": 8}
    refused = _run(TrialRank(0), job)
    assert refused.outcome == "refused"
    assert "it lacks: stability.clip." in (refused.reason or "")
    assert _run(TrialRank(0), {**job, "fresh": ["stability.clip."]}) == Ending("finished", 8)
    assert recorded(tmp_path / "zclip")["train"].keys() == {5, 6, 7, 8}


def _all_progress(rank: TrialRank, job: TrialJob) -> list[Progress]:
    rank.begin(job)
    found = [rank.advance(5)]
    while found[-1].ending is None:
        found.append(rank.advance(5))
    return found


def test_a_trial_stands_still_at_its_rungs_and_trains_as_if_there_were_none(tmp_path: Path) -> None:
    at_rungs = trial_job(tmp_path / "rungs", "validation.at_steps=[4,10,11]")
    found = _all_progress(TrialRank(0), {**at_rungs, "rungs": [4, 10, 11]})
    assert [(progress.step, progress.rung_loss is not None) for progress in found] == [
        (4, True),
        (9, False),
        (10, True),
        (11, True),
        (12, False),
    ]
    _run(TrialRank(0), trial_job(tmp_path / "plain", "validation.every_steps=1"))
    rungs, plain = recorded(tmp_path / "rungs"), recorded(tmp_path / "plain")
    assert rungs["train"] == plain["train"]  # a validation leaves no trace in training
    assert rungs["validation"] == {step: plain["validation"][step] for step in (4, 5, 10, 11, 12)}
    losses = {progress.step: progress.rung_loss for progress in found if progress.rung_loss is not None}
    assert losses == {step: plain["validation"][step]["val/loss"] for step in (4, 10, 11)}


# Finite for ever, and far above where it began.
RISEN = (
    "optimizer.lr=3",
    "schedule.warmup_steps=0",
    "schedule.steps=60",
    "stability.clip={kind: none}",
    "response={kind: record}",
    "validation.every_steps=60",
)


def test_a_loss_that_has_risen_for_good_ends_a_trial_early_with_finite_measures(tmp_path: Path) -> None:
    job: TrialJob = {**trial_job(tmp_path / "risen", *RISEN, "checkpoint.every_steps=0"), "end_early": True}
    ending = _run(TrialRank(0), job)
    assert ending.outcome == "diverged"
    assert ending.step == 9  # under a sixth of its steps
    assert "times the first" in (ending.reason or "")
    config = RunConfig.model_validate(job["config"])
    losses = losses_in_series(tmp_path / "risen")
    assert len(losses) == ending.step
    measures = measure_trial(RunFolder(tmp_path / "risen"), config)
    assert all(map(math.isfinite, measures.values()))
    assert measures["diverged"] == 1
    assert measures["val_loss"] == pytest.approx(losses[0], rel=1e-5)
    # Nothing but that ends it, so a trial that was not to be ended goes on.
    rank = TrialRank(0)
    rank.begin({**job, "run_folder": str(tmp_path / "on"), "end_early": False})
    assert rank.advance(15) == Progress(15)
    rank.close()


def test_a_trial_that_goes_on_is_held_against_the_loss_of_its_first_step(tmp_path: Path) -> None:
    job: TrialJob = {**trial_job(tmp_path / "cut", *RISEN, "checkpoint.every_steps=4"), "end_early": True}
    killed = TrialRank(0)
    killed.begin(job)
    assert killed.advance(5) == Progress(5)
    killed.close()
    ending = _run(TrialRank(0), job)
    # It is far above that from the first step on that it repeats, 5, and not above what it has there.
    assert (ending.outcome, ending.step) == ("diverged", 12)


def test_a_trial_that_takes_a_state_over_goes_on_from_it_at_its_own_rate(tmp_path: Path) -> None:
    short = ("schedule.steps=8", "validation.every_steps=8")
    donor, own = trial_job(tmp_path / "donor", *short), trial_job(tmp_path / "own", *short, "optimizer.lr=5.0e-3")
    _run(TrialRank(0), donor)
    checkpoint = RunFolder(tmp_path / "donor").checkpoints / "step-00000004"
    rank = TrialRank(0)
    rank.begin(own)
    assert rank.advance(4) == Progress(4)
    assert _run(rank, {**own, "take_over": str(checkpoint)}) == Ending("finished", 8)
    taken, given = recorded(tmp_path / "own")["train"], recorded(tmp_path / "donor")["train"]
    assert sorted(taken) == list(range(1, 9))
    # Up to there it was another; from there on it has the donor's weights, bit for bit: the same batch says so.
    assert taken[4]["train/loss"] != given[4]["train/loss"]
    assert taken[5]["train/loss"] == given[5]["train/loss"]
    assert taken[5]["train/grad_norm"] == given[5]["train/grad_norm"]
    # Its own rate: with the donor's, which an optimizer's state can bring along, the update would be the donor's too.
    ratio = 5.0e-3 / RunConfig.model_validate(donor["config"]).optimizer.lr
    assert abs(ratio - 1) > 0.2
    assert taken[5]["train/lr"] / given[5]["train/lr"] == pytest.approx(ratio)
    assert taken[5]["train/update_norm"] / given[5]["train/update_norm"] == pytest.approx(ratio, rel=1e-3)
    assert taken[6]["train/loss"] != given[6]["train/loss"]
    # The rate is all that is its own: at the donor's it does what the donor did.
    _run(rank, {**donor, "run_folder": str(tmp_path / "same"), "take_over": str(checkpoint)})
    assert recorded(tmp_path / "same")["train"] == {step: given[step] for step in (5, 6, 7, 8)}
