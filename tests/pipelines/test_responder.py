"""Spikes in a run: which answer they get, and that nothing else changes. Bad samples in the text, no Ray."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines.loop
import pipelines.responder
from moe.batch import Batch, BatchSource
from moe.trainer import Trainer
from pipelines.checkpoint_manifest import checkpoint_folders, step_of
from pipelines.checkpoint_standing import standing
from pipelines.config import RunConfig
from pipelines.data import TrainBatches
from pipelines.errors import UserError
from pipelines.history import History
from pipelines.journal import Journal
from pipelines.keeper import CheckpointKeeper
from pipelines.outcome import Ending
from pipelines.recorder import Recorder
from pipelines.run_folder import RunFolder
from pipelines.spike_event import SpikeEvent, read_events
from tests.distributed import run_distributed
from tests.pipelines.small_run import metrics_of, run_loop

STEPS = 60
BAD_STEP = 45  # counted from 1
SETTINGS = (
    f"schedule.steps={STEPS}",
    "checkpoint.every_steps=20",
    "checkpoint.confirm_steps=5",
    "validation.every_steps=30",
    "response.calm_steps=10",
)


class BadSamples:
    """Samples whose text is noise, whenever they are read: those that the given steps read in a run without skips."""

    def __init__(self, batches: TrainBatches, config: RunConfig, steps: Sequence[int]) -> None:
        self._batches, self._config = batches, config
        self._bad = {int(sample) for step in steps for sample in batches.sample_ids(step - 1)}

    def __call__(self, step: int) -> list[Batch]:
        share = self._config.data.global_batch_size // self._config.parallel.workers
        micro = list(self._batches(step))
        assert len(micro) == 1
        first = self._batches._rank * share
        ids_BL = micro[0].ids_BL.clone()
        for row, sample in enumerate(self._batches.sample_ids(step)[first : first + share].tolist()):
            if sample in self._bad:
                ids_BL[row] = torch.randint(0, 256, ids_BL[row].shape, generator=torch.Generator().manual_seed(sample))
        return [replace(micro[0], ids_BL=ids_BL)]


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the samples of these steps bad in the runs of this process."""

    def spoiled(batches: TrainBatches, config: RunConfig) -> BatchSource:
        return BadSamples(batches, config, steps)

    monkeypatch.setattr(pipelines.loop, "with_faults", spoiled)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def going_back(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs that would go back and leave samples out: one without a spike, and one that has done so."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEADYMOE_HOME", str(folder / "home"))
        assert run_loop(0, 1, folder / "clean", REWIND) == Ending("finished", STEPS)
        spoil(patch, BAD_STEP)
        assert run_loop(0, 1, folder / "recovered", REWIND) == Ending("finished", STEPS)
    return folder / "clean", folder / "recovered"


def events_of(run: Path) -> list[SpikeEvent]:
    return read_events(RunFolder(run).events)


def losses_of(run: Path) -> dict[int, float]:
    return {step: metrics["train/loss"] for step, metrics in metrics_of(run).items()}


def test_a_batch_of_noise_is_skipped_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, BAD_STEP)
    run = tmp_path / "run"
    assert run_loop(0, 1, run, SETTINGS) == Ending("finished", STEPS)
    (event,) = events_of(run)
    assert (event.kind, event.step, event.action, event.onset) == ("loss", BAD_STEP, "skip_step", BAD_STEP)
    assert event.outcome is not None
    assert (event.outcome.state, event.outcome.steps_lost) == ("recovered", 1)
    assert event.outcome.at_step == BAD_STEP + 11
    assert event.score is not None
    assert event.score >= 6.0 == event.threshold
    assert event.tokens_seen == (BAD_STEP - 1) * 8 * 64
    assert len(event.samples) == 8
    assert event.documents
    assert [layer.layer for layer in event.layers] == [1]
    assert all(layer.expert_max is not None and layer.max_vio is not None for layer in event.layers)
    assert set(event.grad_norms) >= {"dense", "experts", "router"}
    assert event.checkpoint == "step-00000040"
    steps = metrics_of(run)
    assert steps[BAD_STEP]["spike/loss_at_spike"] == event.value == steps[BAD_STEP]["train/loss"]
    assert "train/update_norm" not in steps[BAD_STEP]
    assert [steps[step]["spike/count"] for step in (BAD_STEP - 1, BAD_STEP, STEPS)] == [0, 1, 1]


REWIND = (*SETTINGS, "response.rungs=[rewind_skip_samples]")


def test_after_going_back_the_bad_samples_are_left_out_and_all_else_is_as_it_was(
    going_back: tuple[Path, Path],
) -> None:
    (event,) = events_of(going_back[1])
    assert (event.action, event.rewound_to) == ("rewind_skip_samples", 40)
    assert event.outcome is not None
    assert (event.outcome.state, event.outcome.steps_lost) == ("recovered", 5)
    clean, recovered = map(losses_of, going_back)
    before = [step for step in clean if step < BAD_STEP]
    assert [recovered[step] for step in before] == [clean[step] for step in before]  # the repeated ones, too
    assert recovered[BAD_STEP] != clean[BAD_STEP]
    assert abs(recovered[STEPS] - clean[STEPS]) < 0.2
    history = History.read(RunFolder(going_back[1]).spool)
    assert history.rewound["train/loss"].steps == [41, 42, 43, 44, 45]
    assert history.rewound["train/loss"].values[-1] == event.value
    journal = Journal.read(RunFolder(going_back[1]).journal)
    assert journal.skipped_samples[0].samples == list(event.samples)
    assert journal.rewinds == [40]


@pytest.mark.parametrize(
    "settings",
    [(), pytest.param(("stability.anticipation.kind=always",), marks=pytest.mark.slow)],
    ids=["plain", "anticipating"],
)
def test_a_replay_of_what_went_back_with_nothing_changed_is_the_same_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    """Weights, moments, biases, detector and all: the same batch is bad again, and leads to the same figures."""
    spoil(monkeypatch, BAD_STEP)
    monkeypatch.setattr(TrainBatches, "skip", lambda self, samples, from_step: None)
    again = (*REWIND, *settings, "response.rungs=[rewind_skip_samples, rewind_skip_samples, skip_step]")
    assert run_loop(0, 1, tmp_path / "run", again) == Ending("finished", STEPS)
    first, second, third = events_of(tmp_path / "run")
    assert [event.action for event in (first, second, third)] == ["rewind_skip_samples"] * 2 + ["skip_step"]
    assert [event.timeline for event in (first, second, third)] == [0, 1, 2]
    assert first.outcome is not None
    assert first.outcome.state == "relapsed"

    def figures(event: SpikeEvent) -> dict[str, Any]:
        return event.model_dump(
            exclude={"id", "timeline", "time_ms", "action", "detail", "rewound_to", "outcome", "checkpoint"}
        )

    if not settings:  # the queue is dropped for the new batches, so that the lag ramps up again
        assert figures(first) == figures(second) == figures(third)
    history = History.read(RunFolder(tmp_path / "run").spool)
    steps, values = history.rewound["train/loss"].steps, history.rewound["train/loss"].values
    assert steps == [41, 42, 43, 44, 45] * 2
    if not settings:
        assert values[:5] == values[5:]


def test_a_ladder_is_climbed_while_spikes_come_back_and_ends_the_run_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, *range(BAD_STEP, STEPS + 1))
    monkeypatch.setattr(TrainBatches, "skip", lambda self, samples, from_step: None)
    rungs = "response.rungs=[record, skip_step, rewind_skip_samples, rewind_anticipate, rewind_lower_lr]"
    triggered = "stability.anticipation.kind=triggered"
    ending = run_loop(0, 1, tmp_path / "run", (*SETTINGS, rungs, triggered))
    assert ending.outcome == "diverged"
    assert ending.reason is not None
    assert ending.reason.startswith("no answer of response.rungs is left for step")
    events = events_of(tmp_path / "run")
    assert [event.action for event in events] == [
        "record",
        "skip_step",
        "rewind_skip_samples",
        "rewind_anticipate",
        "rewind_lower_lr",
        "abort",
    ]
    assert [event.outcome.state for event in events if event.outcome] == ["relapsed"] * 5 + ["aborted"]
    journal = Journal.read(RunFolder(tmp_path / "run").journal)
    assert journal.lr_cuts[0].factor == 0.5
    steps = metrics_of(tmp_path / "run")
    assert "moe/anticipation_lag" in steps[journal.anticipated_from[0] + 1]
    lr = steps[journal.lr_cuts[0].from_step]["train/lr"]
    assert steps[journal.lr_cuts[0].from_step + 1]["train/lr"] < 0.1 * lr


def test_a_budget_that_is_used_up_ends_the_run_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 40, 55)
    few = ("response.max_rewinds=1", "response.calm_steps=5")
    ending = run_loop(0, 1, tmp_path / "run", (*REWIND, *few))
    assert (ending.outcome, ending.step) == ("diverged", 55)
    assert ending.reason is not None
    assert "response.max_rewinds reached" in ending.reason


def test_spikes_far_apart_each_begin_at_the_first_rung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 38, 55)
    assert run_loop(0, 1, tmp_path / "run", SETTINGS).outcome == "finished"
    assert [(event.step, event.action) for event in events_of(tmp_path / "run")] == [
        (38, "skip_step"),
        (55, "skip_step"),
    ]


@pytest.mark.parametrize(
    "more",
    [(), pytest.param(("stability.anticipation.kind=always",), marks=pytest.mark.slow)],
    ids=["plain", "anticipating"],
)
def test_a_run_that_is_cut_off_anywhere_goes_on_as_it_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """Checkpoints of the timeline that was left are passed over, and no spike is answered twice."""
    spoil(monkeypatch, 38, 52)
    rungs = "response.rungs=[skip_step, rewind_skip_samples]"
    settings = (*SETTINGS, *more, rungs, "checkpoint.every_steps=10", "response.calm_steps=20")
    whole = tmp_path / "run"
    assert run_loop(0, 1, whole, settings) == Ending("finished", STEPS)
    events = events_of(whole)
    assert [(event.step, event.action) for event in events] == [(38, "skip_step"), (52, "rewind_skip_samples")]
    assert events[1].rewound_to == 45
    before, journal = losses_of(whole), RunFolder(whole).journal.read_text()
    kept = [step_of(path) for path in checkpoint_folders(RunFolder(whole).checkpoints)]
    assert kept == [30, 40, 50, 60]
    for last in (30, 40, 50):
        for path in checkpoint_folders(RunFolder(whole).checkpoints):
            if step_of(path) > last:
                shutil.rmtree(path)
        run_loop(0, 1, whole, settings)
        assert losses_of(whole) == before
        assert [event.id for event in events_of(whole)] == [event.id for event in events]
        assert RunFolder(whole).journal.read_text() == journal


def test_checkpoints_of_a_timeline_that_was_left_are_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save between the state that training went back to and the spike."""
    spoil(monkeypatch, BAD_STEP)
    seen: dict[int, str] = {}
    go_back = CheckpointKeeper.go_back

    def watch(self: Any, step: int) -> None:
        go_back(self, step)
        seen.update(
            {step_of(p): standing(p).state for p in checkpoint_folders(RunFolder(tmp_path / "run").checkpoints)}
        )

    monkeypatch.setattr(CheckpointKeeper, "go_back", watch)
    settings = (*REWIND, "checkpoint.every_steps=11", "checkpoint.confirm_steps=5")
    assert run_loop(0, 1, tmp_path / "run", settings).outcome == "finished"
    assert seen[33] == "good"
    assert seen[44] == "discarded"
    standings = {step_of(p): standing(p).state for p in checkpoint_folders(RunFolder(tmp_path / "run").checkpoints)}
    assert standings[44] in ("unconfirmed", "good")  # saved anew


@pytest.mark.parametrize(
    ("every", "target", "where"),
    [
        (10, 20, "on the disk"),
        pytest.param(0, 35, "in memory, less old than response.guard_steps wants", marks=pytest.mark.slow),
    ],
    ids=["checkpoints", "none"],
)
def test_without_a_snapshot_that_is_old_enough_an_older_checkpoint_is_taken_if_there_is_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    going_back: tuple[Path, Path],
    every: int,
    target: int,
    where: str,
) -> None:
    spoil(monkeypatch, BAD_STEP)
    # A spike that has crept up since step 30, which snapshots of two distances do not reach behind.
    monkeypatch.setattr(pipelines.responder, "is_conspicuous", lambda seen: seen.step >= 30)
    settings = (*REWIND, "response.snapshots=2", f"checkpoint.every_steps={every}", "checkpoint.keep=9")
    run_loop(0, 1, tmp_path / "run", settings)
    event = events_of(tmp_path / "run")[0]
    assert (event.onset, event.rewound_to) == (30, target)
    assert f"went back to step {target} ({where})" in event.detail
    clean, recovered = losses_of(going_back[0]), losses_of(tmp_path / "run")
    first = max(30, target + 1)  # the first step that is repeated and whose samples are among those left out
    assert [recovered[step] for step in range(1, first)] == [clean[step] for step in range(1, first)]
    assert recovered[first] != clean[first]


@pytest.mark.slow
def test_a_worker_that_is_killed_on_the_way_back_finds_no_checkpoint_of_what_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it has written the journal by then or not."""
    spoil(monkeypatch, BAD_STEP)
    settings = (*REWIND, "checkpoint.every_steps=11", "response.rungs=[rewind_lower_lr, skip_step]")
    run_loop(0, 1, tmp_path / "whole", settings)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    for where, what in ((Journal, "write"), (Recorder, "rewind")):
        run = tmp_path / what
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, what, die)
            with pytest.raises(KeyboardInterrupt):
                run_loop(0, 1, run, settings)
        assert run_loop(0, 1, run, settings) == Ending("finished", STEPS)
        assert losses_of(run) == losses_of(tmp_path / "whole")
        assert [event.id for event in events_of(run)] == [event.id for event in events_of(tmp_path / "whole")]
        assert History.read(RunFolder(run).spool).rewound["train/loss"].steps == [41, 42, 43, 44, 45]


def test_all_ranks_go_back_alike(tmp_path: Path, going_back: tuple[Path, Path]) -> None:
    run_distributed(_run_spoiled, 2, str(tmp_path / "both"))
    (event,) = events_of(tmp_path / "both")
    assert (event.step, event.action, event.rewound_to) == (BAD_STEP, "rewind_skip_samples", 40)
    alone, both = losses_of(going_back[1]), losses_of(tmp_path / "both")
    assert both.keys() == alone.keys()
    assert max(abs(both[step] - alone[step]) for step in alone) < 1e-4


def _run_spoiled(rank: int, world: int, run: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, BAD_STEP)
        run_loop(rank, world, Path(run), (*REWIND, "parallel.expert_parallel=2"))


def test_snapshots_that_do_not_fit_are_refused_with_the_arithmetic(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"response.memory_gib: 3 snapshots of .* GiB each take .* raise it, or lower"):
        run_loop(0, 1, tmp_path / "run", (*SETTINGS, "response.memory_gib=0.001"))


@pytest.mark.parametrize("kind", ["ladder", "record"])
def test_an_update_that_is_not_finite_is_taken_back_or_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Loss and gradient were finite, so that nothing was to be seen before it."""
    update = Trainer._update
    spoiled: list[int] = []

    def spoil_once(self: Trainer, *args: Any) -> dict[str, float]:
        metrics = update(self, *args)
        if self.steps_done == BAD_STEP - 1 and not spoiled:
            spoiled.append(self.steps_done)
            self.model.moe_layers()[0].experts.w_up.data[0, 0, 0] = float("inf")
            metrics["train/update_norm"] = float("inf")
        return metrics

    monkeypatch.setattr(Trainer, "_update", spoil_once)
    settings = [s for s in SETTINGS if not s.startswith("response")]
    ending = run_loop(0, 1, tmp_path / "run", (*settings, f"response.kind={kind}"))
    (event,) = events_of(tmp_path / "run")
    assert (event.kind, event.step) == ("non_finite", BAD_STEP)
    if kind == "ladder":
        assert ending == Ending("finished", STEPS)
        assert (event.action, event.rewound_to) == ("rewind_skip_samples", 40)
        assert metrics_of(tmp_path / "run")[STEPS]["spike/count"] == 1
    else:
        assert (ending.outcome, event.action) == ("diverged", "abort")
    clean = [step_of(p) for p in checkpoint_folders(RunFolder(tmp_path / "run").checkpoints)]
    assert clean == ([20, 40, 60] if kind == "ladder" else [20, 40])


def test_a_run_that_only_records_takes_every_finite_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, BAD_STEP)
    settings = tuple(s for s in SETTINGS if not s.startswith("response"))
    assert run_loop(0, 1, tmp_path / "run", (*settings, "response.kind=record")) == Ending("finished", STEPS)
    assert [(event.step, event.action) for event in events_of(tmp_path / "run")] == [(BAD_STEP, "record")]
    assert all("train/update_norm" in metrics for metrics in metrics_of(tmp_path / "run").values())
