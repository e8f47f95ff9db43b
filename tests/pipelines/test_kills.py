"""Runs that are killed, interrupted and rehearse failures: what they lose is time."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipelines.notes import read_notes
from pipelines.run_folder import RunFolder
from pipelines.run_lock import is_written_to
from pipelines.spike_event import read_events
from tests.home import home_at
from tests.pipelines.driver import Driver, await_steps, folders, run_steadymoe, sets, steps_of
from tests.pipelines.mlflow_server import wait_until
from tests.pipelines.small_run import metrics_of

pytestmark = pytest.mark.slow

STEPS = 800
# With a rate that does not depend on their number, shorter runs have the losses of longer ones.
PAIR = ("parallel.workers=2", "parallel.expert_parallel=2", "schedule.decay.kind=constant", "checkpoint.every_steps=20")
FAULTS = """faults=[
 {kind: killed_worker, step: 46, rank: 1},
 {kind: stalled_worker, step: 76, rank: 0, seconds: 300},
 {kind: full_disk, step: 95, steps: 10},
 {kind: dead_tracking_server, step: 112, seconds: 6},
 {kind: corrupt_checkpoint, step: 146, damage: truncated}]"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A STEADYMOE_HOME for all runs."""
    with home_at(tmp_path_factory.mktemp("home")) as path:
        yield path


@pytest.fixture(scope="module")
def whole(home: Path) -> dict[int, float]:
    """The losses of a run that nothing disturbs."""
    settings = sets(*PAIR, f"schedule.steps={STEPS}", f"validation.every_steps={STEPS}", "tracking.run_name=whole")
    run_steadymoe(home, "train", "micro", *settings)
    return _losses(folders()["whole"])


def _until(step: int, losses: dict[int, float]) -> dict[int, float]:
    return {s: loss for s, loss in losses.items() if s <= step}


def _losses(folder: RunFolder) -> dict[int, float]:
    return {step: metrics["train/loss"] for step, metrics in metrics_of(folder.path).items()}


def _group_at_work(driver: Driver, folder: RunFolder, old: set[int]) -> list[psutil.Process]:
    """The two workers that train, once none of the old ones is left."""

    def is_there() -> bool:
        pids = {worker.pid for worker in driver.workers()}
        return len(pids) == 2 and not pids & old and is_written_to(folder)

    wait_until(is_there)
    return driver.workers()


def test_a_run_whose_workers_are_killed_twice_equals_an_undisturbed_one(home: Path, whole: dict[int, float]) -> None:
    settings = sets(*PAIR, "schedule.steps=300", "checkpoint.confirm_steps=10")
    chance = random.Random(0)
    with Driver(home, "train", "micro", *settings, "--set", "tracking.run_name=killed") as driver:
        old: set[int] = set()
        # Far enough apart that the group that replaces a dead one is there before the next kill.
        for start in (30, 150):
            folder = await_steps("killed", start + chance.randrange(40))
            group = _group_at_work(driver, folder, old)
            old |= {worker.pid for worker in group}
            chance.choice(group).kill()
        assert driver.wait() == 0, driver.output()
    assert [note.kind for note in read_notes(folder.notes)].count("death") == 2
    assert _losses(folder) == _until(300, whole)
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    run = client.get_run(folder.info.id)
    assert (run.info.status, run.data.tags["restarts"]) == ("FINISHED", "2")
    points = client.get_metric_history(folder.info.id, "train/loss")
    assert [point.step for point in points] == list(range(1, 301))


def test_a_run_that_is_interrupted_in_every_way_equals_an_undisturbed_one_once_it_is_resumed(
    home: Path, whole: dict[int, float]
) -> None:
    settings = sets(*PAIR, f"schedule.steps={STEPS}", "validation.every_steps=200")
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")

    with Driver(home, "train", "micro", *settings, "--set", "tracking.run_name=parts") as driver:
        folder = await_steps("parts", 50)
        driver.interrupt(signal.SIGINT)
        assert driver.wait() == 130, driver.output()
        assert "Stopping after this step, and saving" in driver.output()
        assert "steadymoe train --resume parts" in driver.output()
        assert "Traceback" not in driver.output()
    stopped_at = steps_of(folder)
    assert (folder.checkpoints / f"step-{stopped_at:08}" / "manifest.json").exists()
    assert client.get_run(folder.info.id).info.status == "KILLED"

    with Driver(home, "train", "--resume", "parts") as driver:
        await_steps("parts", stopped_at + 50)
        started = driver.descendants()
        driver.process.kill()
        driver.wait()
        # The workers may take some steps before Ray ends them, which would count as the next command's.
        wait_until(lambda: not is_written_to(folder))
    assert client.get_run(folder.info.id).info.status == "RUNNING"  # nobody was left to say otherwise

    with Driver(home, "train", "--resume", "parts") as driver:
        await_steps("parts", steps_of(folder) + 30)
        driver.process.send_signal(signal.SIGTERM)
        assert driver.wait() == 130, driver.output()
    assert client.get_run(folder.info.id).info.status == "KILLED"

    run_steadymoe(home, "train", "--resume", "parts")
    assert client.get_run(folder.info.id).info.status == "FINISHED"
    assert _losses(folder) == whole
    points = client.get_metric_history(folder.info.id, "train/loss")
    assert [point.step for point in points] == list(range(1, STEPS + 1))
    # Ray's processes end with the driver they belong to; its agents try for about a minute to say why.
    _, left = psutil.wait_procs(started, timeout=180)
    assert [p for p in left if p.status() != psutil.STATUS_ZOMBIE] == []


def test_a_run_in_which_every_operation_fails_once_equals_an_undisturbed_one(
    home: Path, whole: dict[int, float]
) -> None:
    """Each failure is noticed, told of, and survived."""
    settings = sets(*PAIR, "schedule.steps=200", "checkpoint.confirm_steps=10", "recovery.stall_timeout_s=12")
    faults = FAULTS.replace("\n", "")
    done = run_steadymoe(home, "train", "micro", *settings, "--set", "tracking.run_name=rehearsed", "--set", faults)
    folder = folders()["rehearsed"]
    events = {event.kind: event for event in read_events(folder.events)}
    assert {kind: (event.step, event.action) for kind, event in events.items()} == {
        "worker_death": (145, "restart_workers"),
        "worker_stall": (75, "restart_workers"),
        "checkpoint_failed": (100, "go_on"),
        "tracking_outage": (events["tracking_outage"].step, "go_on"),
        "checkpoint_damaged": (145, "use_older_checkpoint"),
    }
    everything = [(event.kind, event.step) for event in read_events(folder.events)]
    assert ("worker_death", 45) in everything
    assert len(everything) == 6
    assert [event.outcome.state for event in read_events(folder.events) if event.outcome] == ["recovered"] * 6
    assert 112 <= events["tracking_outage"].step < 200
    assert events["worker_stall"].outcome is not None
    assert 12 <= events["worker_stall"].outcome.seconds_lost < 120
    for detail in (event.detail for event in read_events(folder.events) if event.kind != "tracking_outage"):
        assert detail in done.stdout
    assert _losses(folder) == _until(200, whole)
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    run = client.get_run(folder.info.id)
    assert (run.info.status, run.data.tags["restarts"]) == ("FINISHED", "3")
    assert [p.step for p in client.get_metric_history(folder.info.id, "train/loss")] == list(range(1, 201))


def test_a_run_without_restarts_left_fails_and_says_why(home: Path) -> None:
    settings = sets("schedule.steps=3000", "recovery.max_restarts=0", "tracking.run_name=once")
    with Driver(home, "train", "micro", *settings) as driver:
        folder = await_steps("once", 20)
        driver.workers()[0].kill()
        assert driver.wait() == 1, driver.output()
    assert "The run ended early: worker 0 died" in driver.output()
    assert "recovery.max_restarts" in driver.output()
    assert MlflowClient(f"sqlite:///{home / 'mlflow.db'}").get_run(folder.info.id).info.status == "FAILED"
