"""A training run from its first step to its last, on this rank, whatever framework brought the rank up.

Drives the Trainer and does what stands around it: records, validation, checkpoints. Every rank runs the same loop;
rank 0 alone records. It is a generator that pauses after every step, for whoever wants to look or to stop; `train` is
for whoever does not.
"""

import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from moe.config.schedule import StagedSchedule
from moe.counting import count_parameters
from moe.parallel import Ranks
from moe.routing_stats import violation_figures
from moe.state import JSON
from moe.trainer import Report, Trainer
from pipelines.config import RunConfig
from pipelines.data import TokenDataset, TrainBatches, ValidationBatches
from pipelines.errors import UserError
from pipelines.faults import with_faults
from pipelines.hf_weights import load_weights
from pipelines.history import WindowMaximum
from pipelines.keeper import CheckpointKeeper
from pipelines.notes import Note, add_note
from pipelines.outcome import Ending
from pipelines.run_folder import RunFolder
from pipelines.run_lock import RunBusyError, writer_lock
from pipelines.shards import Shards
from pipelines.spool import START, TRAIN, VALIDATION, SpoolReader, SpoolWriter
from pipelines.token_table import tabulate

# How long a worker waits for one that a killed command has left behind; Ray ends those within seconds.
_PREDECESSOR_S = 60.0


class _Recorder:
    """Appends records to the run's spool on rank 0, and does nothing elsewhere."""

    def __init__(self, config: RunConfig, folder: RunFolder, rank: int, start_step: int) -> None:
        self.config = config
        self._stages = config.schedule.as_stages() if isinstance(config.schedule, StagedSchedule) else []
        self.loss_max = WindowMaximum(config.steps, config.tracking.every_steps)
        self._writer = None
        self._notes = folder.notes
        self._recorded = 0
        self._stage = 0
        if rank == 0:
            records = SpoolReader(folder.spool).read()
            self._recorded = max((record.step for record in records if record.kind == TRAIN), default=0)
            self.loss_max.restore(records, start_step)
            self._writer = SpoolWriter(folder.spool)

    def model(self) -> None:
        """Record how large the model is."""
        size = count_parameters(self.config.model)
        figures = {"model/parameters": size.total, "model/active_parameters": size.active}
        self._write(START, 0, {name: float(figure) for name, figure in figures.items()})

    def step(self, report: Report, seconds: float) -> None:
        """Record an optimizer step that took ``seconds``."""
        moment = report.moment
        metrics = dict(report.metrics)
        metrics["train/tokens_per_second"] = moment.global_batch_size * moment.sequence_length / seconds
        if self._stages:
            metrics["train/stage"] = moment.stage + 1
            self._note_stage(report)
        self._note_spikes(report)
        maximum = self.loss_max.update(report.step, metrics["train/loss"])
        if maximum is not None:
            metrics["train/loss_max"] = maximum
        if self.config.tracking.per_layer:
            metrics |= {f"moe_max_vio/layer_{i:02}": v for i, v in enumerate(report.layer_max_vio)}
            metrics |= report.health.by_layer() if report.health is not None else {}
        is_last = report.step == moment.steps or not report.taken
        if report.step % self.config.tracking.every_steps == 0 or is_last or report.health is not None:
            self._write(TRAIN, report.step, metrics)

    def _note_stage(self, report: Report) -> None:
        """Say that a stage begins; steps that a resumed run repeats have been told of already."""
        moment = report.moment
        if moment.stage != self._stage and report.step > self._recorded and self._writer is not None:
            stages, batch = len(self._stages), f"{moment.global_batch_size} x {moment.sequence_length} tokens"
            text = f"step {report.step}: stage {moment.stage + 1} of {stages} begins, with batches of {batch}"
            add_note(self._notes, Note("stage", text))
        self._stage = moment.stage

    def _note_spikes(self, report: Report) -> None:
        """Say what stands out; steps that a resumed run repeats have been told of already."""
        if report.step <= self._recorded or self._writer is None:
            return
        for reading in report.readings:
            if reading.severity == "act" and reading.score is not None:
                what = "loss" if reading.series == "loss" else "gradient norm"
                text = (
                    f"step {report.step}: {what} {reading.value:.4g} is {reading.score:.1f} robust standard deviations"
                    f" above the {reading.baseline:.4g} that was to be expected"
                )
                add_note(self._notes, Note("spike", text))

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
        hash_layers = trainer.config.model.moe.hash_layers
        metrics |= violation_figures("moe/max_vio_global", result.counts_ME, hash_layers)
        metrics["moe/dead_experts"] = float((result.counts_ME == 0).sum())
    return metrics


@dataclass(frozen=True)
class StepDone:
    """What one step of a run was, on any rank."""

    report: Report
    seconds: float
    """Of the step alone, on this rank."""
    validation: Mapping[str, float] | None = None
    """Where the step was followed by a validation."""


Steps = Generator[StepDone, None, Ending]


def train(config: RunConfig, ranks: Ranks, shards: Shards, folder: RunFolder, init_from: Path | None = None) -> Ending:
    """`train_steps` to their end. Collective."""
    steps = train_steps(config, ranks, shards, folder, init_from)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            ending: Ending = end.value
            return ending


def train_steps(
    config: RunConfig, ranks: Ranks, shards: Shards, folder: RunFolder, init_from: Path | None = None
) -> Steps:
    """Train from the newest valid checkpoint in ``folder``, or from the start, to the schedule's end, step by step.

    The start is the weights in ``init_from``, or random ones. ``config.model.vocab_size`` must be set. Advancing is
    collective; a generator that is closed leaves the run as it is after its last step.

    Raises:
        RuntimeError: on rank 0, a worker of an earlier command still writes to the folder.
    """
    with ExitStack() as stack:
        # Held by one rank for all: the others do nothing before they have heard from it.
        if ranks.rank == 0:
            try:
                stack.enter_context(writer_lock(folder, _PREDECESSOR_S))
            except RunBusyError as error:
                # Nothing that a user could mend: the workers start again, and find it gone.
                raise RuntimeError(str(error)) from error
        return (yield from _train(config, ranks, shards, folder, init_from))


def _train(config: RunConfig, ranks: Ranks, shards: Shards, folder: RunFolder, init_from: Path | None) -> Steps:
    lookahead = config.model.mtp.depth
    length = config.data.sequence_length
    training = TrainBatches(TokenDataset(shards.train, length, lookahead), config, ranks.rank, ranks.world)
    held_out = ValidationBatches(TokenDataset(shards.validation, length, lookahead), config, ranks.rank, ranks.world)
    trainer = Trainer(config, ranks, with_faults(training, config))
    keeper = CheckpointKeeper(trainer, folder, config.checkpoint, _metadata(config, shards))
    if not keeper.resume():
        if init_from is not None:
            load_weights(trainer.state(), config.model, init_from)
        else:
            _check_start(trainer)
    if ranks.rank == 0 and folder.spool.exists():
        add_note(folder.notes, Note("resume", f"training goes on after step {trainer.steps_done}"))
    recorder = _Recorder(config, folder, ranks.rank, trainer.steps_done)
    recorder.model()
    try:
        return (yield from _steps(trainer, held_out, recorder, keeper, folder))
    finally:
        recorder.close()


def _check_start(trainer: Trainer) -> None:
    """Raises UserError: nothing that a restart could mend."""
    try:
        trainer.check_start()
    except ValueError as error:
        raise UserError(str(error)) from error


def _metadata(config: RunConfig, shards: Shards) -> dict[str, JSON]:
    """What a checkpoint says of how it was made."""
    return {
        "corpus_digest": shards.manifest.corpus_digest,
        "tokenizer_sha256": shards.manifest.tokenizer.sha256,
        "threads": config.parallel.threads,
    }


def _steps(
    trainer: Trainer, held_out: ValidationBatches, recorder: _Recorder, keeper: CheckpointKeeper, folder: RunFolder
) -> Steps:
    config: RunConfig = recorder.config
    steps, every = config.steps, config.checkpoint.every_steps
    while trainer.steps_done < steps:
        clock = time.perf_counter()
        # Looked for by one rank and carried to all by the step's own exchange: they stop at the same boundary.
        if trainer.ranks.rank == 0 and folder.stop.exists():
            trainer.request("stop")
        report = trainer.step()
        seconds = time.perf_counter() - clock
        recorder.step(report, seconds)
        if not report.taken:
            keeper.event(f"non-finite at step {report.step}")
            yield StepDone(report, seconds)
            return Ending("diverged", report.step, f"loss or gradient was not finite at step {report.step}")
        keeper.step_taken()
        last, stop = report.step == steps, "stop" in report.requests
        validation = None
        if report.step % config.validation.every_steps == 0 or last:
            validation = validate(trainer, held_out)
            recorder.validation(report.step, validation)
        if last and config.validation.per_token:
            table = tabulate(trainer, held_out)
            if trainer.ranks.rank == 0:
                table.write(folder.tokens)
        if stop or (last and config.checkpoint.at_end):
            keeper.save(required=True)
        elif "save" in report.requests or (every and report.step % every == 0):
            keeper.save(required=False)
        yield StepDone(report, seconds, validation)
        if stop and not last:
            return Ending("stopped", report.step, f"asked to stop at step {report.step}")
    return Ending("finished", steps)
