"""What one Ray Train worker of a nested trial does: train its rank's part, and wait at the rungs."""

from pathlib import Path
from typing import Any, TypedDict

from pipelines.outcome import Ending
from pipelines.run_folder import RunFolder
from pipelines.worker import work
from tuning.rung_gate import knock, wait_at_gate
from tuning.trial_rank import TrialJob, TrialRank


class NestedJob(TypedDict):
    """What the trial tells its workers."""

    trial: TrialJob
    started_ms: int
    """As of `pipelines.worker.WorkerJob`."""


def train_trial(job: NestedJob) -> dict[str, Any]:
    """Ray Train's loop function. Returns a `pipelines.outcome.Ending` as a mapping."""
    folder = RunFolder(Path(job["trial"]["run_folder"]))
    return work(folder, job["started_ms"], lambda: _train(job["trial"], folder))


def _train(trial: TrialJob, folder: RunFolder) -> Ending:
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    device = get_device()
    assert isinstance(device, torch.device)
    if device.type == "cuda":
        # Ray shows a worker the GPUs of its neighbours, too.
        torch.cuda.set_device(device)
    rank = TrialRank(get_context().get_world_rank())
    rank.begin(trial)
    while True:
        progress = rank.advance(steps=1)
        if progress.ending is not None:
            return progress.ending
        if progress.rung_loss is None:
            continue
        if rank.rank == 0:
            knock(folder, progress.step, progress.rung_loss)
        if not wait_at_gate(folder, progress.step):
            rank.close()
            return Ending("stopped", progress.step, f"ended at the rung of step {progress.step}")
