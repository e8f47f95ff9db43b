"""Failures of operations rehearsed in a run of Ray's workers: each is noticed, told of, and survived."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.spike_event import read_events
from tests.pipelines.driver import folders, run_steadymoe, sets
from tests.pipelines.small_run import metrics_of

pytestmark = pytest.mark.slow

FAULTS = """faults=[
 {kind: killed_worker, step: 46, rank: 1},
 {kind: stalled_worker, step: 76, rank: 0, seconds: 300},
 {kind: full_disk, step: 95, steps: 10},
 {kind: dead_tracking_server, step: 112, seconds: 6},
 {kind: corrupt_checkpoint, step: 146, damage: truncated}]"""
SETTINGS = sets(
    "parallel.workers=2",
    "parallel.expert_parallel=2",
    "schedule.steps=200",
    "checkpoint.every_steps=20",
    "checkpoint.confirm_steps=10",
    "recovery.stall_timeout_s=12",
)


def test_a_run_in_which_everything_fails_once_equals_an_undisturbed_one(home: Path) -> None:
    run_steadymoe(home, "train", "micro", *SETTINGS, "--set", "tracking.run_name=whole")
    faults = FAULTS.replace("\n", "")
    done = run_steadymoe(home, "train", "micro", *SETTINGS, "--set", "tracking.run_name=rehearsed", "--set", faults)
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
    losses = [{s: m["train/loss"] for s, m in metrics_of(folders()[n].path).items()} for n in ("whole", "rehearsed")]
    assert losses[0] == losses[1]
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    run = client.get_run(folder.info.id)
    assert (run.info.status, run.data.tags["restarts"]) == ("FINISHED", "3")
    assert [p.step for p in client.get_metric_history(folder.info.id, "train/loss")] == list(range(1, 201))
