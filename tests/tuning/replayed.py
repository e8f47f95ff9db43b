"""Runs with spikes, and their replays without Ray and MLflow, for the tests of both."""

from pathlib import Path
from typing import Any

from moe.parallel import join
from pipelines.config import RunConfig
from pipelines.loading import dump_config
from pipelines.loop import train
from pipelines.prepare import prepare
from pipelines.run_folder import RunFolder, RunInfo, write_whole
from pipelines.spike_event import SpikeEvent, add_event, event_id
from pipelines.text import fit_to_text
from tests.pipelines.small_run import small_config
from tuning.replay_faults import write_faults
from tuning.replay_plan import Arm, Plan, arm_journal
from tuning.replay_trials import samples_of_spike
from tuning.trial_rank import TrialJob, TrialRank


def write_run(path: Path, *settings: str, config: RunConfig | None = None) -> RunFolder:
    """The folder of a run that has not done a step."""
    folder = RunFolder(path)
    write_whole(folder.config, dump_config(config or small_config(*settings)))
    folder.write_info(RunInfo(path.name, path.name, "steadymoe", "1", "2026-05-01T10:00:00+00:00", "sqlite:////db"))
    return folder


def run_of(path: Path, *settings: str) -> RunFolder:
    """A run from its first step to its last, in this process."""
    config = small_config(*settings)
    shards = prepare(config.data)
    config = fit_to_text(config, shards)
    folder = write_run(path, config=config)
    train(config, join(config.parallel), shards, folder)
    return folder


def add_spike(folder: RunFolder, step: int, **changes: Any) -> SpikeEvent:
    """Record a loss spike in a run's folder."""
    timeline = changes.get("timeline", 0)
    fields = {
        "id": event_id(changes.get("kind", "loss"), step, timeline),
        "kind": "loss",
        "step": step,
        "onset": step,
        "action": "skip_step",
        **changes,
    }
    event = SpikeEvent.model_validate(fields)
    add_event(folder.events, event)
    return event


def replay(plan: Plan, arm: Arm, path: Path, outcome: str = "finished") -> RunFolder:
    """Run the trial of a treatment in this process; it must end so."""
    shards = prepare(arm.config.data)
    folder = RunFolder(path)
    arm_journal(plan, arm.change, samples_of_spike(plan, shards)).write(folder.journal)
    write_faults(folder, arm.config, plan.faults_left_out)
    job = TrialJob(
        config=fit_to_text(arm.config, shards).model_dump(mode="json"),
        run_folder=str(path),
        shards=str(shards.folder),
        until_step=plan.until,
    )
    if plan.start.checkpoint is not None:
        job |= {"checkpoint": str(plan.start.checkpoint), "fresh": list(arm.change.fresh)}
    rank = TrialRank(0)
    rank.begin(job)
    ending = rank.advance(1000).ending
    assert ending is not None
    assert ending.outcome == outcome, ending
    return folder
