"""A training run from its first step to its last, on this rank, whatever framework brought the rank up.

Drives the Trainer and does what stands around it: records, validation, checkpoints. Every rank runs the same loop;
rank 0 alone records.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from moe.counting import count_parameters
from moe.parallel import Ranks
from moe.routing_stats import max_violation
from moe.state import JSON
from moe.trainer import Report, Trainer
from pipelines import checkpoints
from pipelines.config import RunConfig
from pipelines.data import TokenDataset, TrainBatches, ValidationBatches
from pipelines.history import WindowMaximum
from pipelines.run_folder import RunFolder
from pipelines.shards import Shards
from pipelines.spool import START, TRAIN, VALIDATION, SpoolReader, SpoolWriter


@dataclass(frozen=True)
class Ending:
    """How a run's loop ended; the same on every rank."""

    outcome: Literal["finished", "stopped", "diverged"]
    step: int
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Inverse of ``Ending(**content)``."""
        return asdict(self)


class _Recorder:
    """Appends records to the run's spool on rank 0, and does nothing elsewhere."""

    def __init__(self, config: RunConfig, folder: RunFolder, rank: int, start_step: int) -> None:
        self.config = config
        self.loss_max = WindowMaximum(config.schedule.steps, config.tracking.every_steps)
        self._writer = None
        if rank == 0:
            self.loss_max.restore(SpoolReader(folder.spool).read(), start_step)
            self._writer = SpoolWriter(folder.spool)

    def model(self) -> None:
        """Record how large the model is."""
        size = count_parameters(self.config.model)
        figures = {"model/parameters": size.total, "model/active_parameters": size.active}
        self._write(START, 0, {name: float(figure) for name, figure in figures.items()})

    def step(self, report: Report, seconds: float) -> None:
        """Record an optimizer step that took ``seconds``."""
        data = self.config.data
        metrics = dict(report.metrics)
        metrics["train/tokens_per_second"] = data.global_batch_size * data.sequence_length / seconds
        maximum = self.loss_max.update(report.step, metrics["train/loss"])
        if maximum is not None:
            metrics["train/loss_max"] = maximum
        if self.config.tracking.per_layer:
            metrics |= {f"moe_max_vio/layer_{i:02}": v for i, v in enumerate(report.layer_max_vio)}
        is_last = report.step == self.config.schedule.steps or not report.taken
        if report.step % self.config.tracking.every_steps == 0 or is_last:
            self._write(TRAIN, report.step, metrics)

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record a validation."""
        self._write(VALIDATION, step, metrics)

    def _write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is not None:
            self._writer.write(kind, step, metrics)

    def close(self) -> None:
        """Finish the spool."""
        if self._writer is not None:
            self._writer.close()


def validate(trainer: Trainer, batches: ValidationBatches) -> dict[str, float]:
    """Loss and load balance over the held-out windows. Collective."""
    result = trainer.evaluate(batches)
    metrics = {"val/loss": result.loss_sum / result.tokens, "val/nats_per_byte": result.loss_sum / batches.text_bytes}
    if result.counts_ME is not None:
        violation_M = max_violation(result.counts_ME)
        metrics["moe/max_vio_global"] = float(violation_M.mean())
        metrics["moe/max_vio_global_worst"] = float(violation_M.max())
        metrics["moe/dead_experts"] = float((result.counts_ME == 0).sum())
    return metrics


def train(config: RunConfig, ranks: Ranks, shards: Shards, folder: RunFolder) -> Ending:
    """Train from the newest valid checkpoint in ``folder``, or from the start, to ``schedule.steps``. Collective.

    ``config.model.vocab_size`` must be set.
    """
    lookahead = config.model.mtp.depth
    length = config.data.sequence_length
    training = TrainBatches(TokenDataset(shards.train, length, lookahead), config, ranks.rank, ranks.world)
    held_out = ValidationBatches(TokenDataset(shards.validation, length, lookahead), config, ranks.rank, ranks.world)
    trainer = Trainer(config, ranks, training)
    _resume(trainer, folder)
    recorder = _Recorder(config, folder, ranks.rank, trainer.steps_done)
    recorder.model()
    try:
        return _steps(trainer, held_out, recorder, folder, shards)
    finally:
        recorder.close()


def _resume(trainer: Trainer, folder: RunFolder) -> None:
    """Take up the newest valid checkpoint, if there is one. Rank 0 looks, so that all ranks take the same."""
    found: list[Path | None] = [checkpoints.newest_valid(folder.checkpoints) if trainer.ranks.rank == 0 else None]
    if trainer.ranks.world > 1:
        dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        restored = checkpoints.load(found[0], trainer.state())
        trainer.restore(restored["scalars"])


def _steps(
    trainer: Trainer, held_out: ValidationBatches, recorder: _Recorder, folder: RunFolder, shards: Shards
) -> Ending:
    config: RunConfig = recorder.config
    steps, every = config.schedule.steps, config.checkpoint.every_steps
    saved_at = trainer.steps_done
    clock = time.perf_counter()
    while trainer.steps_done < steps:
        report = trainer.step()
        recorder.step(report, time.perf_counter() - clock)
        if not report.taken:
            return Ending("diverged", report.step, f"loss or gradient was not finite at step {report.step}")
        stop = "stop" in report.requests
        if report.step % config.validation.every_steps == 0 or report.step == steps:
            recorder.validation(report.step, validate(trainer, held_out))
        if report.step == steps or stop or "save" in report.requests or (every and report.step % every == 0):
            _save(trainer, folder, shards, config.checkpoint.keep)
            saved_at = report.step
        if stop and report.step < steps:
            return Ending("stopped", saved_at, "asked to stop")
        clock = time.perf_counter()
    return Ending("finished", steps)


def _save(trainer: Trainer, folder: RunFolder, shards: Shards, keep: int) -> None:
    """Save a checkpoint, then drop the oldest ones. Collective."""
    metadata: dict[str, JSON] = {
        "corpus_digest": shards.manifest.corpus_digest,
        "threads": trainer.config.parallel.threads,
    }
    checkpoints.save(folder.checkpoints, trainer.state(), step=trainer.steps_done, metadata=metadata)
    if trainer.ranks.rank == 0:
        checkpoints.prune(folder.checkpoints, keep)
