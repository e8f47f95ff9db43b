"""`steadymoe submit -- sweep` on a real head: stopped as a job, and taken up again by another."""

import re
import signal
from collections import Counter
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from pipelines.job import JOB_TAG
from tests.infra.local_cluster import LocalCluster
from tests.pipelines.small_run import SETTINGS

pytestmark = pytest.mark.slow

# So many, and so long, that some are left when the first has ended and the driver has heard that it is to stop.
TRIALS, STEPS = 6, 400
SWEEP = {
    "title": "Rates",
    "question": "Which rate?",
    "base": ["micro"],
    "config": {"schedule": {"steps": STEPS, "warmup_steps": 2}},
    "settings": [setting for setting in SETTINGS if not setting.startswith(("schedule", "checkpoint"))],
    "space": {"optimizer.lr": {"kind": "log_uniform", "low": 1e-3, "high": 1e-2}},
    "searcher": {"kind": "random"},
    "budget": {"trials": TRIALS},
}


def runs_of(client: MlflowClient) -> dict[str, Run]:
    """All runs that MLflow has of sweeps, by name."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, "tags.role = 'sweep'")
    return {str(run.info.run_name): run for run in found}


def test_a_sweep_that_is_stopped_as_a_job_goes_on_as_another_and_runs_no_finished_trial_again(
    cluster: LocalCluster,
) -> None:
    (cluster.home / "rates.yaml").write_text(yaml.safe_dump(SWEEP))
    with cluster.popen("submit", "--", "sweep", "rates.yaml") as watching:
        assert watching.stdout is not None
        lines = []
        for line in watching.stdout:
            lines.append(line)
            if re.match(rf"\[1/{TRIALS}\] ", line):
                watching.send_signal(signal.SIGINT)
        output = "".join(lines)
    assert watching.returncode == 130, output
    assert "To go on: steadymoe sweep --resume rates-1" in output
    client = MlflowClient(cluster.server.address)
    stopped = runs_of(client)
    parent = stopped.pop("rates-1")
    assert parent.info.status == "KILLED"
    finished = {name: run for name, run in stopped.items() if run.info.status == "FINISHED"}
    assert 1 <= len(finished) < TRIALS
    assert {run.info.status for run in stopped.values()} <= {"FINISHED", "KILLED"}

    done = cluster.run("submit", "--", "sweep", "--resume", "rates-1")
    assert f"[{TRIALS}/{TRIALS}]" in done.stdout
    whole = runs_of(client)
    parent = whole.pop("rates-1")
    assert (parent.info.status, parent.data.metrics["sweep/trials"]) == ("FINISHED", TRIALS)
    # A job is found from what it did, the last one that worked on it.
    (job_id,) = set(re.findall(r"submitted (raysubmit_\w+)", done.stdout))
    assert parent.data.tags[JOB_TAG] == job_id
    assert len(whole) == TRIALS
    assert {run.info.status for run in whole.values()} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in whole.values()} == {parent.info.run_id}
    ends = {name: run.info.end_time for name, run in finished.items()}
    assert {name: whole[name].info.end_time for name in ends} == ends
    for run in whole.values():
        points = client.get_metric_history(run.info.run_id, "train/loss")
        assert Counter(point.step for point in points) == Counter(range(1, STEPS + 1))
    # Where the user is told to look.
    told = [Path(path) for path in re.findall(rf"{re.escape(str(cluster.home))}\S+\.(?:yaml|html)", done.stdout)]
    assert {path.name for path in told if path.is_file()} == {"best.yaml", "compare.html"}
    link = f"{cluster.server.address}/#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}"
    assert link in done.stdout
