"""A run as a driver and its rank 0 would make it, for the tests of tracking."""

from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric

from pipelines.config import RunConfig
from pipelines.run_folder import RunFolder
from pipelines.spool import TRAIN, VALIDATION, SpoolWriter
from pipelines.tracking import DatasetInfo

DATASET = DatasetInfo("stdlib", "0123456789abcdef" * 4, "/somewhere/shards", {"tokens": 1000, "documents": 7})


def config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate({"schedule": {"steps": 600, "warmup_steps": 0}, **changes})


def train(folder: RunFolder, first: int, last: int) -> None:
    """Record these steps, and a validation at the last."""
    with SpoolWriter(folder.spool) as writer:
        for step in range(first, last + 1):
            writer.write(TRAIN, step, {"train/loss": 5 / step, "train/lr": 1e-3})
        writer.write(VALIDATION, last, {"val/loss": 6 / last})


def points(client: MlflowClient, folder: RunFolder, name: str) -> list[tuple[int, float]]:
    """All points of a metric in MLflow, by step."""
    history: list[Metric] = client.get_metric_history(folder.info.id, name)
    return sorted((point.step, point.value) for point in history)
