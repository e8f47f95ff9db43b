"""Runs as training leaves them in their folders, with losses and events that a test chooses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pipelines.config import RunConfig
from pipelines.home import runs_dir
from pipelines.loading import dump_config
from pipelines.run_folder import RunFolder, RunInfo, write_json, write_whole
from pipelines.spool import START, TRAIN, VALIDATION, SpoolWriter
from tests.pipelines.small_run import small_config
from tests.pipelines.spiky import outcome, record, spike
from tuning.comparison.runs import ComparedRun, read_run

STEPS = 20
VALIDATE_EVERY = 5
TOKENS_PER_STEP = 8 * 64
"""Of the small run."""
UNTRAINED = 5.5
DIGEST = "0123456789abcdef" * 4


@dataclass(frozen=True)
class Made:
    """What a run is to have been."""

    name: str
    settings: tuple[str, ...] = ()
    seed: int = 0
    loss: float = 3.0
    """Validation loss at the end; the training loss is the same."""
    max_vio: float | None = 0.5
    done: int | None = None
    """Steps; None is all of the schedule."""
    lost_at: int | None = None
    """The first step whose loss is not finite, which is the last that is done."""
    spikes: Sequence[int] = ()
    """Steps of loss spikes, each of which has cost 6."""
    layers: int = 0
    """MoE layers whose MaxVio is recorded."""
    further: int = 0
    """Further metrics."""
    dataset: str | None = DIGEST
    parameters: float = 75e3
    ending: dict[str, Any] = field(default_factory=lambda: {"status": "FINISHED", "tags": {}, "metrics": {}})

    def write(self) -> RunFolder:
        """Into a folder of its own under STEADYMOE_HOME."""
        config = _config((f"schedule.steps={STEPS}", f"validation.every_steps={VALIDATE_EVERY}", *self.settings))
        config = config.model_copy(update={"seed": self.seed})
        folder = RunFolder(runs_dir() / f"id-{self.name}")
        created, uri = "2026-05-01T10:00:00+00:00", f"sqlite:///{runs_dir().parent / 'mlflow.db'}"
        folder.write_info(RunInfo(f"id-{self.name}", self.name, "steadymoe", "1", created, uri))
        write_whole(folder.config, dump_config(config))
        if self.dataset is not None:
            write_json(folder.dataset, {"name": "files", "digest": self.dataset})
        write_json(folder.ending, self.ending)
        self._write_metrics(folder, config)
        for step in self.spikes:
            record(folder, spike(step, layers=()), outcome("recovered", step + 10))
        return folder

    def read(self) -> ComparedRun:
        """As a comparison sees it."""
        return read_run(self.write())

    def _write_metrics(self, folder: RunFolder, config: RunConfig) -> None:
        steps = config.steps
        last = self.lost_at if self.lost_at is not None else self.done if self.done is not None else steps
        with SpoolWriter(folder.spool) as writer:
            writer.write(
                START, 0, {"model/parameters": self.parameters, "model/active_parameters": self.parameters / 2}
            )
            for step in range(1, last + 1):
                loss = math.nan if step == self.lost_at else self._loss_at(step, steps)
                metrics = {"train/loss": loss, "train/grad_norm": 1.0, "train/tokens_per_second": 1000.0}
                metrics |= {f"moe_max_vio/layer_{layer:02}": 2.0 / step + layer for layer in range(self.layers)}
                metrics |= {f"further/metric_{number:03}": float(number) for number in range(self.further)}
                writer.write(TRAIN, step, metrics)
                if (step % config.validation.every_steps == 0 or step == steps) and step != self.lost_at:
                    validation = {"val/loss": self._loss_at(step, steps)}
                    if self.max_vio is not None:
                        validation["moe/max_vio_global"] = self.max_vio
                    writer.write(VALIDATION, step, validation)

    def _loss_at(self, step: int, steps: int) -> float:
        """Along a line from the loss before training."""
        return UNTRAINED + (self.loss - UNTRAINED) * (step - 1) / (steps - 1)


@cache
def _config(settings: tuple[str, ...]) -> RunConfig:
    return small_config(*settings)


def lr(value: str) -> tuple[str, ...]:
    return (f"optimizer.lr={value}",)


def many(settings: tuple[str, ...], losses: Sequence[float], name: str, **same: object) -> list[Made]:
    """A configuration with these losses, one a seed."""
    return [
        Made(f"{name}-s{seed}", settings, seed, loss, **same)  # type: ignore[arg-type]
        for seed, loss in enumerate(losses)
    ]


def folders(*made: Made) -> list[RunFolder]:
    return [each.write() for each in made]
