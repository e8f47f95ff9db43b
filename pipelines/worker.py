"""What one Ray Train worker does: take its place among the ranks and run the training loop."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.outcome import Ending
from pipelines.run_folder import RunFolder


class WorkerJob(TypedDict):
    """What the driver tells its workers: plain values, since every process opens files for itself."""

    config: dict[str, Any]
    run_folder: str
    shards: str
    started_ms: int
    """When the driver began, in milliseconds since 1970: failures before that are not this attempt's."""


def train_worker(job: WorkerJob) -> dict[str, Any]:
    """Ray Train's loop function; Ray has set up the process group. Returns an `Ending` as a mapping."""
    folder = RunFolder(Path(job["run_folder"]))
    return work(folder, job["started_ms"], lambda: _train(job, folder))


def work(folder: RunFolder, started_ms: int, train: Callable[[], Ending]) -> dict[str, Any]:
    """Run ``train`` as a worker of Ray Train does, unless that has failed twice in the same way since ``started_ms``.

    Returns:
        How it ended, as a mapping.
    """
    from pipelines.failures import hopeless
    from pipelines.notes import read_notes

    recent = [note for note in read_notes(folder.notes) if note.time_ms >= started_ms]
    if reason := hopeless(recent):
        return Ending("failed", 0, reason).to_json()
    try:
        return train().to_json()
    except UserError as error:
        # Every rank raises it alike: what the outside world refuses is found out by all together.
        return Ending("refused", 0, str(error)).to_json()
    except Exception as error:
        # Ray brings the error to its controller, but not where it was raised.
        error.add_note(traceback.format_exc())
        raise


def _train(job: WorkerJob, folder: RunFolder) -> Ending:
    import torch
    from ray.train.torch import get_device

    from moe.parallel import join
    from pipelines.loop import train
    from pipelines.shards import open_shards

    config = RunConfig.model_validate(job["config"])
    device = get_device()
    assert isinstance(device, torch.device)
    ranks = join(config.parallel, device)
    return train(config, ranks, open_shards(Path(job["shards"])), folder, folder.init_from)
