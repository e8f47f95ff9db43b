"""A sweep of nested trials as a user meets it: real Ray Train runs under real Tune trials, killed and interrupted."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.checkpoint_manifest import step_name
from pipelines.command_line import EXIT_INTERRUPTED
from pipelines.notes import read_notes
from pipelines.run_folder import RunFolder, find_sweep
from tests.home import home_at
from tests.pipelines.driver import Driver, run_steadymoe, sets, steps_of
from tests.pipelines.mlflow_server import wait_until
from tests.tuning.test_sweep import check_tree, client_of, journal_of, names, trials_of, write

STEPS, KILLED_AT = 240, 70
# In the order in which they are tried the first is the best: the others are pruned.
SPACE = {"optimizer.lr": {"kind": "grid", "values": [1e-2, 1e-4, 1e-3]}}
ASHA = {"kind": "asha", "first_rung": 30, "reduction": 2}
SETTINGS = sets(
    f"schedule.steps={STEPS}",
    f"validation.every_steps={STEPS}",
    "checkpoint.every_steps=50",
    "parallel.workers=2",
    "parallel.expert_parallel=2",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with home_at(tmp_path_factory.mktemp("home")) as path:
        yield path


def endings(sweep: RunFolder) -> dict[str, Any]:
    """What became of the trials, by number."""
    trials = journal_of(sweep).trials.values()
    return {
        trial.begun.name.rpartition("-")[2]: (trial.ended.outcome, trial.step, trial.ended.measures["val_loss"])
        for trial in trials
        if trial.ended is not None
    }


def test_nested_trials_survive_a_killed_worker_and_an_interrupt_and_end_as_plain_ones(home: Path) -> None:
    plain = {"space": SPACE, "scheduler": ASHA, "confirm": None}
    run_steadymoe(home, "sweep", write(home, "plain", **plain), *SETTINGS)
    kill = {"faults": [{"kind": "killed_worker", "step": KILLED_AT, "rank": 1}]}
    file = write(home, "nested", **plain, config=kill)
    with Driver(home, "sweep", file, "--nested", *SETTINGS) as driver:
        wait_until(lambda: "nested-1" in names(home))
        sweep = find_sweep("nested-1")
        wait_until(lambda: "nested-1-00" in journal_of(sweep).trials)
        first = RunFolder(Path(journal_of(sweep).trials["nested-1-00"].begun.folder))
        wait_until(lambda: steps_of(first) > KILLED_AT + 20, 120)
        driver.interrupt()
        assert driver.wait() == EXIT_INTERRUPTED, driver.output()
    client = client_of(home)
    assert {run.info.status for run in trials_of(client, sweep)} == {"KILLED"}
    before = steps_of(first)
    assert KILLED_AT < before < STEPS
    assert (first.checkpoints / step_name(before)).exists()
    run_steadymoe(home, "sweep", "--resume", "nested-1")
    assert endings(sweep) == endings(find_sweep("plain-1"))
    assert [outcome for outcome, _, _ in endings(sweep).values()] == ["finished", "pruned", "pruned"]
    check_tree(client, sweep)
    notes = [note.text for note in read_notes(first.notes)]
    # Once by Ray Train, under the same trial; once by the user's resume.
    assert any(re.match(r"worker 1 died", text) for text in notes)
    assert f"training goes on after step {before}" in notes
    finished = [run for run in trials_of(client, sweep) if run.data.tags["outcome"] == "finished"]
    assert {run.data.tags["restarts"] for run in finished} == {"1"}
