"""Faults of operations, and the events of those who notice them. Without Ray, which test_kills has."""

import errno
import multiprocessing
import signal
import time
from pathlib import Path

import pytest

from pipelines.checkpoint_manifest import CheckpointError, checkpoint_folders, verify
from pipelines.checkpoint_standing import newest_valid, standing
from pipelines.notes import read_notes
from pipelines.outcome import Ending
from pipelines.rehearsal import cut_off, empty_disk, fill_disk, refuse_if_cut_off, refuse_if_full
from pipelines.run_folder import RunFolder, read_json
from pipelines.spike_event import read_events
from tests.distributed import run_distributed
from tests.pipelines.faults.scene import AT, faulty
from tests.pipelines.small_run import metrics_of, run_loop

FORKSERVER = multiprocessing.get_context("forkserver")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))


def pauses(rank: int, world: int, folder: Path) -> list[float]:
    """Seconds before each step's forward on this rank."""
    changes = {"parallel": {"workers": world, "expert_parallel": world}}
    fault = {"kind": "stalled_worker", "step": AT, "rank": 1, "seconds": 5.5}
    trainer = faulty(folder, fault, recovery={"stall_timeout_s": 5}, **changes)
    (stall,) = trainer.hooks
    spent = []
    for _ in range(AT + 1):
        clock = time.perf_counter()
        stall.before_step(trainer.timeline.at(trainer.steps_done))
        spent.append(time.perf_counter() - clock)
        trainer.step()
    return spent


@pytest.mark.slow
def test_a_worker_stalls_for_as_long_as_it_says_and_once(tmp_path: Path) -> None:
    _, stalled = run_distributed(pauses, 2, tmp_path)
    assert [round(seconds) for seconds in stalled[: AT - 1]] == [0] * (AT - 1)
    assert 5.5 <= stalled[AT - 1] < 7
    assert round(stalled[AT]) == 0


def die(rank: int, world: int, folder: Path) -> None:
    trainer = faulty(
        folder,
        {"kind": "killed_worker", "step": AT, "rank": 1},
        parallel={"workers": world, "expert_parallel": world},
    )
    for _ in range(AT + 3):
        trainer.step()


def test_a_worker_is_killed_at_its_step_and_only_once(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 died without a word|gloo"):
        run_distributed(die, 2, tmp_path)
    assert read_json(RunFolder(tmp_path).faults) == {
        "happened": [{"number": 0, "kind": "killed_worker", "step": AT, "rewinds": 0}]
    }
    assert run_distributed(die, 2, tmp_path) == [None, None]


def test_a_full_disk_costs_checkpoints_until_it_is_empty_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    fault = "faults=[{kind: full_disk, step: 7, steps: 4}]"
    settings = ("checkpoint.every_steps=2", "checkpoint.keep=9")
    assert run_loop(0, 1, run.path, (*settings, fault)) == Ending("finished", 12)
    assert [path.name[-2:] for path in checkpoint_folders(run.checkpoints)] == ["02", "04", "06", "12"]
    events = read_events(run.events)
    assert [(event.id, event.action) for event in events] == [
        ("checkpoint_failed-000008", "go_on"),
        ("checkpoint_failed-000010", "go_on"),
    ]
    assert "No space left on device" in events[0].detail
    assert [(e.outcome.state, e.outcome.at_step, e.outcome.seconds_lost) for e in events if e.outcome] == [
        ("recovered", 12, 0.0)
    ] * 2
    run_loop(0, 1, tmp_path / "clean", settings)
    assert metrics_of(run.path) == metrics_of(tmp_path / "clean")


def test_a_disk_that_is_full_at_the_end_is_no_silent_loss(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    settings = ("faults=[{kind: full_disk, step: 7, steps: 6}]",)
    with pytest.raises(
        CheckpointError, match=r"the checkpoint of step 12 could not be written .*No space left on device"
    ) as refused:
        run_loop(0, 1, run.path, settings)
    missed, last = read_events(run.events)
    assert (missed.id, missed.action) == ("checkpoint_failed-000008", "go_on")
    assert (last.id, last.action, last.detail) == ("checkpoint_failed-000012", "abort", str(refused.value))
    assert [(e.outcome.state, e.outcome.at_step) for e in (missed, last) if e.outcome] == [("aborted", 12)] * 2
    empty_disk(run.checkpoints)
    assert run_loop(0, 1, run.path, settings) == Ending("finished", 12)
    assert read_events(run.events) == [missed, last]


def run_alone(run: Path, *settings: str) -> int | None:
    """The exit code of a process that runs the loop."""
    process = FORKSERVER.Process(target=run_loop, args=(0, 1, run, settings), daemon=True)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize("damage", ["truncated", "bit_flip"])
def test_a_damaged_checkpoint_is_met_passed_over_and_told_of(tmp_path: Path, damage: str) -> None:
    run = RunFolder(tmp_path / "run")
    settings = (f"faults=[{{kind: corrupt_checkpoint, step: 10, damage: {damage}}}]", "checkpoint.keep=9")
    assert run_alone(run.path, *settings) == -signal.SIGKILL
    older, newest = checkpoint_folders(run.checkpoints)
    assert newest_valid(run.checkpoints) == older
    with pytest.raises(CheckpointError, match="damaged" if damage == "bit_flip" else "bytes where"):
        verify(newest)
    assert sorted(metrics_of(run.path)) == list(range(1, 10))
    run_loop(0, 1, run.path, settings)
    (event,) = read_events(run.events)
    assert (event.id, event.action) == ("checkpoint_damaged-000009", "use_older_checkpoint")
    assert event.detail == "checkpoint step-00000008 is damaged, and was passed over"
    assert event.outcome is not None
    assert (event.outcome.state, event.outcome.at_step) == ("recovered", 9)
    assert event.outcome.seconds_lost > 0
    assert event.detail in [note.text for note in read_notes(run.notes)]
    run_loop(0, 1, tmp_path / "clean", ("checkpoint.keep=9",))
    assert metrics_of(run.path) == metrics_of(tmp_path / "clean")
    assert {path.name: standing(path).state for path in checkpoint_folders(run.checkpoints)} == {
        f"step-{step:08}": "unconfirmed" for step in (4, 8, 12)
    }


def test_without_a_checkpoint_nobody_is_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # The disk was full when it was due.
    faults = "faults=[{kind: full_disk, step: 4, steps: 2}, {kind: corrupt_checkpoint, step: 6}]"
    assert run_loop(0, 1, tmp_path / "run", (faults,)) == Ending("finished", 12)
    assert "faults.1 finds no checkpoint to damage" in caplog.text


def test_marks_refuse_what_they_say_and_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    refuse_if_full(folder.checkpoints)
    refuse_if_cut_off(folder)
    fill_disk(folder.checkpoints)
    with pytest.raises(OSError, match="No space left") as full:
        refuse_if_full(folder.checkpoints)
    assert full.value.errno == errno.ENOSPC
    empty_disk(folder.checkpoints)
    refuse_if_full(folder.checkpoints)
    cut_off(folder, 0.3)
    with pytest.raises(ConnectionRefusedError):
        refuse_if_cut_off(folder)
    time.sleep(0.35)
    refuse_if_cut_off(folder)


def test_a_server_is_cut_off_for_as_long_as_the_fault_says(tmp_path: Path) -> None:
    trainer = faulty(tmp_path, {"kind": "dead_tracking_server", "step": AT, "seconds": 60.0})
    folder = RunFolder(tmp_path)
    for _ in range(AT - 1):
        trainer.step()
        refuse_if_cut_off(folder)
    trainer.step()
    until = read_json(folder.cut_off)["until_ms"] / 1000
    assert 55 < until - time.time() <= 60
    trainer.step()
    assert read_json(folder.cut_off)["until_ms"] / 1000 == until
