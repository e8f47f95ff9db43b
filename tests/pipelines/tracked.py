"""A run as a driver and its rank 0 would make it, for the tests of tracking."""

from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus, Metric

from pipelines.config import RunConfig
from pipelines.run_folder import RunFolder
from pipelines.spool import TRAIN, VALIDATION, SpoolWriter
from pipelines.tracking import DatasetInfo

DATASET = DatasetInfo("stdlib", "0123456789abcdef" * 4, "/somewhere/shards", {"tokens": 1000, "documents": 7})


def config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate({"schedule": {"kind": "simple", "steps": 600, "warmup_steps": 0}, **changes})


def train(folder: RunFolder, first: int, last: int) -> None:
    """Record these steps, and a validation at the last."""
    with SpoolWriter(folder.spool) as writer:
        for step in range(first, last + 1):
            writer.write(TRAIN, step, {"train/loss": 5 / step, "train/lr": 1e-3})
        writer.write(VALIDATION, last, {"val/loss": 6 / last})


def checkpoint(folder: RunFolder, step: int) -> Path:
    """What the driver sees of a checkpoint: a folder with a manifest."""
    path = folder.checkpoints / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")
    return path


def checkpoints_in(client: MlflowClient, folder: RunFolder) -> dict[str, dict[str, float]]:
    """The finished logged models of a run with their metrics. Fails if two have the same name."""
    models = client.search_logged_models([folder.info.experiment_id], f"source_run_id = '{folder.info.id}'")
    names = [model.name for model in models]
    assert len(set(names)) == len(names)
    assert all(model.status == LoggedModelStatus.READY for model in models)
    return {model.name: {m.key: m.value for m in model.metrics or []} for model in models}


def points(client: MlflowClient, folder: RunFolder, name: str) -> list[tuple[int, float]]:
    """All points of a metric in MLflow, by step."""
    history: list[Metric] = client.get_metric_history(folder.info.id, name)
    return sorted((point.step, point.value) for point in history)
