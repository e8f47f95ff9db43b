"""Runs whose driver vanished, and drivers that cannot write down how their run ended."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines.delivery import deliver
from pipelines.ending import DESCRIPTION_TAG
from pipelines.errors import UserError
from pipelines.home import HOME_VARIABLE, runs_dir, sweeps_dir
from pipelines.orphans import end_orphans, end_orphans_in_background
from pipelines.run_folder import RunFolder, RunInfo
from pipelines.run_lock import RunBusyError, RunLock, writer_lock
from pipelines.spool import SpoolReader
from pipelines.tracking import Tracker
from pipelines.tracking_store import URI_VARIABLE, TrackingStore, local_database, open_store, shown
from tests.pipelines.mlflow_server import wait_until
from tests.pipelines.tracked import DATASET, config, points, train

# For every home that it reads, as a process of its own would; importing what a driver needs takes seconds.
DRIVER = """
import os, sys
from contextlib import ExitStack
from pipelines.tracking import Tracker
from pipelines.tracking_store import local_database, open_store
from tests.pipelines.tracked import DATASET, config, train
with ExitStack() as stack:
    for line in sys.stdin:
        os.environ["STEADYMOE_HOME"] = line.strip()
        tracker = stack.enter_context(Tracker.start(config(), open_store(local_database()), dataset=DATASET))
        train(tracker.folder, 1, 3)
        print(tracker.info.id, flush=True)
"""
HOMES = 7


@pytest.fixture(scope="module")
def vanished_in(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> list[tuple[Path, str]]:
    """Homes, and the id of the run in each whose driver was killed with SIGKILL; a test takes one of them."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop(URI_VARIABLE, None)
    found = []
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        text=True,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        for _ in range(HOMES):
            home = tmp_path_factory.mktemp("home")
            shutil.copy(empty_database, home / "mlflow.db")
            print(home, file=driver.stdin, flush=True)
            found.append((home, driver.stdout.readline().strip()))
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv(URI_VARIABLE, raising=False)
            for home, run_id in found:
                patch.setenv(HOME_VARIABLE, str(home))
                with pytest.raises(UserError, match=rf"run run-1 is in use by process {driver.pid} on "):
                    deliver(RunFolder(runs_dir() / run_id))
                end_orphans(open_store(local_database()))
        driver.kill()
    return found


@pytest.fixture
def vanished(vanished_in: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run whose driver was killed, in a database that takes it for alive."""
    home, run_id = vanished_in.pop()
    monkeypatch.setenv(HOME_VARIABLE, str(home))
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    assert open_store(local_database()).client.get_run(run_id).info.status == "RUNNING"
    return RunFolder(runs_dir() / run_id)


@pytest.fixture
def its_store(vanished: RunFolder) -> TrackingStore:
    """The database of ``vanished``."""
    return open_store(local_database())


def test_a_run_whose_driver_vanished_is_ended_by_the_next_that_comes_by(
    its_store: TrackingStore, vanished: RunFolder
) -> None:
    end_orphans(its_store)
    run = its_store.client.get_run(vanished.info.id)
    assert run.info.status == "KILLED"
    assert run.info.end_time == SpoolReader(vanished.spool).read()[-1].time_ms
    assert run.data.metrics["final/loss"] == round(5 / 3, 4)
    assert "at step 3 (its driver vanished)" in run.data.tags[DESCRIPTION_TAG]
    assert points(its_store.client, vanished, "train/loss") == [(step, 5 / step) for step in (1, 2, 3)]


def test_a_run_whose_driver_vanished_is_ended_by_its_delivery(its_store: TrackingStore, vanished: RunFolder) -> None:
    assert deliver(vanished) is None
    assert its_store.client.get_run(vanished.info.id).info.status == "KILLED"


def test_a_run_whose_driver_vanished_can_be_resumed(its_store: TrackingStore, vanished: RunFolder) -> None:
    with Tracker.start(config(), its_store, dataset=DATASET, resume=vanished):
        train(vanished, 4, 5)
    assert its_store.client.get_run(vanished.info.id).info.status == "FINISHED"
    assert points(its_store.client, vanished, "train/loss") == [(step, 5 / step) for step in range(1, 6)]


def test_a_run_that_a_worker_still_writes_to_has_not_ended(its_store: TrackingStore, vanished: RunFolder) -> None:
    with writer_lock(vanished, patience_s=0.0):
        end_orphans(its_store)
        with pytest.raises(RunBusyError, match="is still written to by a training worker"):
            deliver(vanished)
    assert its_store.client.get_run(vanished.info.id).info.status == "RUNNING"
    end_orphans(its_store)
    assert its_store.client.get_run(vanished.info.id).info.status == "KILLED"


def test_a_run_whose_config_cannot_be_read_any_more_is_ended(its_store: TrackingStore, vanished: RunFolder) -> None:
    vanished.config.write_text("of_another_version: 1\n")
    end_orphans(its_store)
    run = its_store.client.get_run(vanished.info.id)
    assert (run.info.status, run.data.metrics["final/loss"]) == ("KILLED", round(5 / 3, 4))


def test_a_damaged_folder_keeps_no_other_run_from_being_ended(its_store: TrackingStore, vanished: RunFolder) -> None:
    for name in ("0", "f" * 32):  # before and after the other, in whatever order they are listed
        folder = runs_dir() / name
        folder.mkdir()
        (folder / "run.json").write_text("{")
    end_orphans(its_store)
    assert its_store.client.get_run(vanished.info.id).info.status == "KILLED"


def _no_room(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_on_a_full_disk_mlflow_still_learns_how_a_run_ended_and_nobody_overrules_it(
    store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full, Tracker.start(config(), store, dataset=DATASET) as tracker:
        train(tracker.folder, 1, 3)
        full.setattr("pipelines.run_folder.write_whole", _no_room)
        tracker.end_as("FAILED", "no room for the last checkpoint")
    assert tracker.undelivered is None
    assert not tracker.folder.ending.exists()
    run = store.client.get_run(tracker.info.id)
    assert run.info.status == "FAILED"
    assert "(no room for the last checkpoint)" in run.data.tags[DESCRIPTION_TAG]
    end_orphans(store)
    assert store.client.get_run(tracker.info.id).info.status == "FAILED"


def test_a_run_that_gets_no_folder_is_not_left_running(store: TrackingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.tracking.write_whole", _no_room)
    with pytest.raises(UserError, match="No space left"):
        Tracker.start(config(), store, dataset=DATASET)
    experiment = store.client.get_experiment_by_name("steadymoe")
    assert experiment is not None
    (run,) = store.client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"


def test_a_driver_that_vanishes_while_it_resumes_leaves_a_run_that_is_ended(
    its_store: TrackingStore, vanished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_orphans(its_store)

    def vanish(*_: object) -> None:
        raise SystemExit(137)

    monkeypatch.setattr(its_store.client, "set_tag", vanish)
    with pytest.raises(SystemExit):
        Tracker.start(config(), its_store, dataset=DATASET, resume=vanished)
    assert its_store.client.get_run(vanished.info.id).info.status == "RUNNING"
    end_orphans(its_store)
    assert its_store.client.get_run(vanished.info.id).info.status == "KILLED"


def test_a_sweep_whose_driver_vanished_is_ended_by_the_next_training(store: TrackingStore) -> None:
    run = store.client.create_run(store.experiment_id("steadymoe-sweeps"), run_name="gone")
    folder = RunFolder(sweeps_dir() / run.info.run_id)
    info = RunInfo(run.info.run_id, "gone", "steadymoe-sweeps", run.info.experiment_id, "2026-01-01", shown(store.uri))
    folder.write_info(info)
    lock = RunLock(folder)
    end_orphans_in_background(store, parents=True)
    wait_until(lambda: "orphans" not in {thread.name for thread in threading.enumerate()})
    assert store.client.get_run(info.id).info.status == "RUNNING"  # somebody works on it
    lock.release()
    end_orphans_in_background(store, parents=True)
    wait_until(lambda: store.client.get_run(info.id).info.status == "KILLED")
