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

from moe.parallel import Ranks
from moe.report import Report
from moe.routing_stats import violation_figures
from moe.state import JSON
from moe.trainer import Trainer
from pipelines.comeback import Comeback
from pipelines.config import RunConfig
from pipelines.data import TokenDataset, TrainBatches, ValidationBatches
from pipelines.errors import UserError
from pipelines.faults.batches import with_faults
from pipelines.faults.hooks import fault_hooks
from pipelines.hf_weights import load_weights
from pipelines.keeper import CheckpointKeeper, StartingPoint
from pipelines.notes import Note, add_note
from pipelines.outcome import Ending
from pipelines.recorder import Recorder
from pipelines.responder import Responder
from pipelines.run_folder import RunFolder
from pipelines.run_lock import RunBusyError, writer_lock
from pipelines.shards import Shards
from pipelines.token_table import tabulate

# How long a worker waits for one that a killed command has left behind; Ray ends those within seconds.
_PREDECESSOR_S = 60.0


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
    rewound_to: int | None = None
    """Where training went back after it: the optimizer steps done in the state that it goes on from."""


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
    config: RunConfig,
    ranks: Ranks,
    shards: Shards,
    folder: RunFolder,
    init_from: Path | None = None,
    start: StartingPoint | None = None,
) -> Steps:
    """Train from the newest valid checkpoint in ``folder``, or from the start, to the schedule's end, step by step.

    The start is ``start``, or the weights in ``init_from``, or random ones. ``config.model.vocab_size`` must be set.
    Advancing is collective; a generator that is closed leaves the run as it is after its last step.

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
        return (yield from _train(config, ranks, shards, folder, init_from, start))


def _train(
    config: RunConfig,
    ranks: Ranks,
    shards: Shards,
    folder: RunFolder,
    init_from: Path | None,
    start: StartingPoint | None,
) -> Steps:
    lookahead = config.model.mtp.depth
    length = config.data.sequence_length
    training = TrainBatches(TokenDataset(shards.train, length, lookahead), config, ranks.rank, ranks.world)
    held_out = ValidationBatches(TokenDataset(shards.validation, length, lookahead), config, ranks.rank, ranks.world)
    trainer = Trainer(config, ranks, with_faults(training, config))
    keeper = CheckpointKeeper(trainer, folder, config.checkpoint, _metadata(config, shards))
    if not keeper.resume():
        if start is not None:
            keeper.begin_with(start)
        elif init_from is not None:
            load_weights(trainer.state(), config.model, init_from)
        else:
            _check_start(trainer)
    if ranks.rank == 0 and folder.spool.exists():
        add_note(folder.notes, Note("resume", f"training goes on after step {trainer.steps_done}"))
    responder = Responder(config.response, trainer, training, keeper, folder)
    trainer.hooks += [responder, *fault_hooks(config, trainer, folder), Comeback(trainer, folder)]
    recorder = Recorder(config, folder, ranks.rank, trainer.steps_done)
    recorder.make_up(responder.journal.rewinds)
    recorder.model()
    try:
        return (yield from _steps(trainer, held_out, recorder, keeper, responder, folder))
    finally:
        responder.finish()
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
    trainer: Trainer,
    held_out: ValidationBatches,
    recorder: Recorder,
    keeper: CheckpointKeeper,
    responder: Responder,
    folder: RunFolder,
) -> Steps:
    config: RunConfig = recorder.config
    steps = config.steps
    while trainer.steps_done < steps:
        clock = time.perf_counter()
        # Looked for by one rank and carried to all by the step's own exchange: they stop at the same boundary.
        if trainer.ranks.rank == 0 and folder.stop.exists():
            trainer.request("stop")
        report = trainer.step()
        seconds = time.perf_counter() - clock
        responder.see_update(report)
        recorder.step(report, seconds, responder.journal.events, responder.at_spike)
        response = responder.after_step(report, seconds)
        if response.ending is not None:
            yield StepDone(report, seconds)
            return response.ending
        stop = "stop" in report.requests
        if response.rewound_to is not None:
            recorder.rewind(response.rewound_to)
            if stop:
                keeper.save(required=True)
            yield StepDone(report, seconds, rewound_to=response.rewound_to)
            if stop:
                return Ending("stopped", trainer.steps_done, f"asked to stop at step {report.step}")
            continue
        validation = _round_off(trainer, report, held_out, recorder, keeper, folder)
        yield StepDone(report, seconds, validation)
        if stop and report.step < steps:
            return Ending("stopped", report.step, f"asked to stop at step {report.step}")
    return Ending("finished", steps)


def _round_off(
    trainer: Trainer,
    report: Report,
    held_out: ValidationBatches,
    recorder: Recorder,
    keeper: CheckpointKeeper,
    folder: RunFolder,
) -> dict[str, float] | None:
    """What stands between a step that holds and the next: validation and checkpoint, if it is time. Collective."""
    config, last = recorder.config, report.step == recorder.config.steps
    keeper.step_done()
    validation = None
    if report.step % config.validation.every_steps == 0 or report.step in config.validation.at_steps or last:
        validation = validate(trainer, held_out)
        recorder.validation(report.step, validation)
    if last and config.validation.per_token:
        table = tabulate(trainer, held_out)
        if trainer.ranks.rank == 0:
            table.write(folder.tokens)
    every = config.checkpoint.every_steps
    if "stop" in report.requests or (last and config.checkpoint.at_end):
        keeper.save(required=True)
    elif "save" in report.requests or (every and report.step % every == 0):
        keeper.save(required=False)
    return validation
