"""What one Ray Train worker does: take its place among the ranks and run the training loop."""

from pathlib import Path
from typing import Any, TypedDict

from pipelines.config import RunConfig


class WorkerJob(TypedDict):
    """What the driver tells its workers: plain values, since every process opens files for itself."""

    config: dict[str, Any]
    run_folder: str
    shards: str


def train_worker(job: WorkerJob) -> dict[str, Any]:
    """Ray Train's loop function; Ray has set up the process group. Returns ``pipelines.loop.Ending`` as a mapping."""
    import torch
    from ray.train.torch import get_device

    from moe.parallel import join
    from pipelines.loop import train
    from pipelines.run_folder import RunFolder
    from pipelines.shards import open_shards

    config = RunConfig.model_validate(job["config"])
    device = get_device()
    assert isinstance(device, torch.device)
    ranks = join(config.parallel, device)
    ending = train(config, ranks, open_shards(Path(job["shards"])), RunFolder(Path(job["run_folder"])))
    return ending.to_json()
