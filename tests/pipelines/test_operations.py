"""Events of operations: who writes them, and what becomes of them."""

import shutil
import time
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError

from pipelines.delivery import Drainer
from pipelines.failures import WorkerFailures
from pipelines.notes import read_notes
from pipelines.operations import FAILURES, last_step, record_operation, settle
from pipelines.outage import Outage
from pipelines.outcome import Ending
from pipelines.rehearsal import cut_off
from pipelines.run_folder import RunFolder, RunInfo
from pipelines.run_lock import RunLock
from pipelines.spike_event import SpikeEvent, add_event, read_events
from pipelines.spool import REWIND, TRAIN, VALIDATION, Record, SpoolWriter
from pipelines.tracking import Tracker
from pipelines.tracking_store import TrackingStore
from tests.pipelines.mlflow_server import wait_until
from tests.pipelines.small_run import metrics_of, run_loop
from tests.pipelines.tracked import DATASET, config, points, train

STALL = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation"
)
RESET = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection reset by peer")


def record(folder: RunFolder, *steps: int) -> None:
    with SpoolWriter(folder.spool) as writer:
        for step in steps:
            writer.write(TRAIN, step, {"train/loss": 1.0})


@pytest.mark.parametrize(
    ("errors", "kind", "words"),
    [
        ({0: RESET, 1: ActorDiedError()}, "worker_death", "worker 1 died"),
        ({0: RESET}, "worker_death", "worker 0 lost its peers"),
        ({0: STALL, 1: ActorDiedError()}, "worker_death", "worker 1 died"),
        ({0: STALL, 2: RESET}, "worker_stall", "worker 0, 2 waited for its peers in vain"),
        ({0: STALL, 1: ValueError("bad")}, "worker_error", "worker 1 failed: ValueError: bad"),
    ],
)
def test_a_failure_is_an_event_of_its_kind(tmp_path: Path, errors: dict[int, Exception], kind: str, words: str) -> None:
    folder = RunFolder(tmp_path)
    record(folder, 1, 2, 7)
    WorkerFailures(folder).after_exception(None, errors)
    (event,) = read_events(folder.events)
    assert (event.id, event.kind, event.step, event.action) == (f"{kind}-000007", kind, 7, "restart_workers")
    assert event.detail.startswith(words)
    assert [note.text for note in read_notes(folder.notes)] == [event.detail]


def test_events_of_one_step_have_names_of_their_own(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for _ in range(3):
        record_operation(folder, "worker_death", "restart_workers", "died")
    record_operation(folder, "worker_stall", "restart_workers", "stalled")
    record(folder, 4)
    record_operation(folder, "worker_death", "restart_workers", "died")
    assert [event.id for event in read_events(folder.events)] == [
        "worker_death-000000", "worker_death-000000-2", "worker_death-000000-3", "worker_stall-000000",
        "worker_death-000004",
    ]  # fmt: skip


def test_an_event_says_how_often_the_run_had_gone_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    add_event(folder.events, SpikeEvent(id="loss-000009", kind="loss", step=9, action="rewind", rewound_to=5))
    record_operation(folder, "worker_death", "restart_workers", "died")
    assert [event.timeline for event in read_events(folder.events)] == [0, 1]


def test_the_last_step_is_found_at_the_end_of_a_long_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = tmp_path / "metrics.jsonl"
    assert last_step(spool) == 0
    spool.write_bytes(Record.measured("start", 0, {}).to_line())
    assert last_step(spool) == 0
    lines = [Record.measured(TRAIN, step, {"train/loss": 1.0}).to_line() for step in range(1, 200)]
    monkeypatch.setattr("pipelines.operations._TAIL_BYTES", 500)
    validation = Record.measured(VALIDATION, 190, {"val/loss": 1.0}).to_line()
    spool.write_bytes(b"".join(lines) + validation + lines[3][:20])
    assert last_step(spool) == 199
    spool.write_bytes(b"".join(lines) + Record.measured(REWIND, 150, {}).to_line())
    assert last_step(spool) == 150


def test_an_event_keeps_the_time_at_which_it_was_noticed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    record_operation(folder, "worker_death", "restart_workers", "died")
    noticed = read_events(folder.events)[0].time_ms
    time.sleep(0.01)
    assert read_events(folder.events)[0].time_ms == noticed


def test_only_what_is_open_is_settled_and_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    record(folder, 3)
    record_operation(folder, "worker_death", "restart_workers", "died")
    record_operation(folder, "checkpoint_failed", "go_on", "full")
    (death, _) = read_events(folder.events)
    settle(folder, FAILURES, 5, now_ms=death.time_ms + 4000)
    settle(folder, FAILURES, 9, now_ms=death.time_ms + 9000)
    first, second = read_events(folder.events)
    assert first.outcome is not None
    assert (first.outcome.state, first.outcome.at_step) == ("recovered", 5)
    assert 4 <= first.outcome.seconds_lost < 5  # since the step, which was done before the death was noticed
    assert second.outcome is None


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("left", ["step-00000012", "step-00000004"])
def test_a_death_is_over_when_training_is_as_far_as_it_was(tmp_path: Path, left: str) -> None:
    run = RunFolder(tmp_path / "run")
    run_loop(0, 1, run.path, ("checkpoint.keep=9",))
    for path in run.checkpoints.iterdir():
        if path.name > left:
            shutil.rmtree(path)
    whole = metrics_of(run.path)
    record_operation(run, "worker_death", "restart_workers", "died")
    assert run_loop(0, 1, run.path, ("checkpoint.keep=9",)) == Ending("finished", 12)
    (event,) = read_events(run.events)
    assert event.step == 12
    assert event.outcome is not None
    assert (event.outcome.state, event.outcome.at_step, event.outcome.steps_lost) == ("recovered", 12, 0)
    assert event.outcome.seconds_lost > 0
    assert metrics_of(run.path) == whole


def info(folder: RunFolder) -> None:
    folder.write_info(RunInfo("0", "run-1", "e", "0", "2026", "http://127.0.0.1:1"))


def test_an_outage_is_one_event_however_many_deliveries_fail(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    info(folder)
    record(folder, 5)
    outage = Outage(folder)
    assert not outage.is_over()
    for _ in range(3):
        outage.goes_on(ConnectionRefusedError("refused"))
    assert outage.is_over()
    assert not outage.is_over()
    record(folder, 6)
    outage.goes_on(OSError("gone\nmore"))
    first, second = read_events(folder.events)
    assert [(e.id, e.kind, e.action) for e in (first, second)] == [
        ("tracking_outage-000005", "tracking_outage", "go_on"), ("tracking_outage-000006", "tracking_outage", "go_on")
    ]  # fmt: skip
    assert second.detail == "MLflow at http://127.0.0.1:1 takes nothing (gone); training goes on"
    assert first.outcome is not None
    assert (first.outcome.state, first.outcome.at_step, first.outcome.seconds_lost) == ("recovered", 5, 0.0)
    assert second.outcome is None
    # The next driver meets the outage's end.
    later = Outage(folder)
    later.goes_on(OSError("gone"))
    assert later.is_over()
    assert [event.outcome.state for event in read_events(folder.events) if event.outcome] == ["recovered"] * 2


def test_delivery_that_is_cut_off_waits_and_misses_nothing(store: TrackingStore) -> None:
    with Tracker.start(config(), store, dataset=DATASET) as tracker:
        folder = tracker.folder
    folder.ending.unlink()
    cut_off(folder, 1.5)
    drainer = Drainer(store.client, folder, RunLock(folder), interval_s=0.1)
    drainer.start()
    train(folder, 1, 30)
    wait_until(lambda: bool(read_events(folder.events)), 10)
    assert points(store.client, folder, "train/loss") == []
    assert drainer.finish(60) is None
    (event,) = read_events(folder.events)
    assert event.kind == "tracking_outage"
    assert "Connection refused" in event.detail
    assert event.outcome is not None
    assert event.outcome.state == "recovered"
    assert points(store.client, folder, "train/loss") == [(step, 5 / step) for step in range(1, 31)]


def test_an_outage_is_noticed_within_moments_while_all_points_are_held_back(store: TrackingStore) -> None:
    with Tracker.start(config(), store, dataset=DATASET) as tracker:
        folder = tracker.folder
    folder.ending.unlink()
    drainer = Drainer(store.client, folder, RunLock(folder), interval_s=60, lag_steps=100)
    drainer.start()
    train(folder, 1, 30)
    cut_off(folder, 3)
    cut_at = time.time()
    wait_until(lambda: bool(read_events(folder.events)), 30)
    (event,) = read_events(folder.events)
    assert (event.kind, event.step) == ("tracking_outage", 30)
    assert event.time_ms / 1000 < cut_at + 2.5  # a delivery is a minute away
    assert drainer.finish(60) is None
    assert points(store.client, folder, "train/loss") == [(step, 5 / step) for step in range(1, 31)]
