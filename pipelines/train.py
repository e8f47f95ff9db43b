"""The driver of a training run: text to tokens, a tracked run, Ray Train workers, and what the user sees of it.

``python -m pipelines.train tiny`` takes the arguments of ``steadymoe train``, for ``ray job submit``.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

from rich.console import Console

from moe.config.model import ModelConfig
from pipelines import commands
from pipelines.arguments import TrainArguments
from pipelines.byte_progress import ByteProgress
from pipelines.command_line import (
    EXIT_DEFECT,
    EXIT_DONE,
    EXIT_ENDED_BY_POLICY,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    run_command,
)
from pipelines.config import RunConfig
from pipelines.data import refuse_short_text
from pipelines.description import Status
from pipelines.errors import UserError
from pipelines.fit import fit
from pipelines.home import refuse_unwritable_home
from pipelines.init_from import check_start
from pipelines.interrupts import Interrupts
from pipelines.job import job_tags, run_in_job
from pipelines.loading import load_config
from pipelines.orphans import end_orphans_in_background
from pipelines.outcome import Outcome
from pipelines.prepare import absolute_paths, prepare
from pipelines.progress import RunProgress
from pipelines.ray_session import ray_session, refuse_impossible_cluster
from pipelines.run_folder import RunFolder, find_run
from pipelines.shards import Manifest, Shards
from pipelines.summary import print_summary
from pipelines.tracking import DatasetInfo, Tracker
from pipelines.tracking_store import open_store_in_background, tracking_uri

_STATUS: dict[Outcome, Status] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "diverged": "FAILED",
    "refused": "FAILED",
    "failed": "FAILED",
}
_EXIT_CODES: dict[Outcome, int] = {
    "finished": EXIT_DONE,
    "stopped": EXIT_INTERRUPTED,
    "diverged": EXIT_ENDED_BY_POLICY,
    "refused": EXIT_USER_ERROR,
    "failed": EXIT_DEFECT,
}


def run(arguments: TrainArguments) -> int:
    """One training run, new or resumed; returns the exit code.

    Raises:
        UserError: config, text, tracking store or cluster do not allow the run.
    """
    started = time.monotonic()
    console = Console()
    resumed = find_run(arguments.resume) if arguments.resume is not None else None
    config = load_config([str(resumed.config)], arguments.settings) if resumed else arguments.config()
    info = resumed.info if resumed else None
    refuse_unwritable_home()
    refuse_impossible_cluster(config)
    shards = _prepare(config, console)
    config = config.model_copy(
        update={"model": _fit_vocabulary(config.model, shards.manifest), "data": absolute_paths(config.data)}
    )
    refuse_short_text(config, shards)
    init_from = resumed.init_from if resumed else arguments.weights
    check_start(init_from, resumed, config, console)
    # Importing MLflow takes seconds, and so does starting Ray. Not sooner: wrong text leaves no database behind.
    opening = open_store_in_background(tracking_uri(config.tracking, info))
    _print(console, "starting Ray ...")
    with ray_session(config), Interrupts() as interrupts:
        tracker = Tracker.start(
            config,
            opening.result(),
            dataset=_dataset_info(shards),
            preset=arguments.presets[0],
            resume=resumed,
            tags={**job_tags(), **({"init_from": str(init_from)} if init_from else {})},
        )
        if init_from:
            tracker.folder.write_init_from(init_from)
        end_orphans_in_background(tracker.store)
        with tracker, RunProgress(tracker.folder, config.steps, console) as progress:
            progress.phase(f"starting {config.parallel.workers} Ray Train worker(s)")
            ending = fit(config, shards, tracker.folder, progress, interrupts)
            if (status := _STATUS[ending.outcome]) != "FINISHED":
                tracker.end_as(status, ending.reason)
            _draw(config, tracker.folder, progress)
    print_summary(tracker.folder, time.monotonic() - started, console)
    if tracker.undelivered:
        _print(console, tracker.undelivered)
    if ending.outcome == "refused":
        raise UserError(str(ending.reason))
    if ending.outcome != "finished":
        _print(console, f"The run ended early: {ending.reason}.")
    if ending.outcome == "stopped":
        _print(console, f"To go on: steadymoe train --resume {tracker.folder.info.name}")
    return _EXIT_CODES[ending.outcome]


def _prepare(config: RunConfig, console: Console) -> Shards:
    """The token shards; a corpus that is not known yet is made into them with its progress shown."""
    with ExitStack() as stack:
        shown: list[ByteProgress] = []

        def show(done: int, total: int) -> None:
            if not shown:
                shown.append(stack.enter_context(ByteProgress(console, total)))
                shown[0].phase("preparing text")
            shown[0].update(done, total)

        shards = prepare(config.data, show)
    manifest = shards.manifest
    console.print(
        f"text: {manifest.train.documents:,} documents, {manifest.train.tokens / 1e6:.1f} M tokens to train on, "
        f"{manifest.validation.documents:,} and {manifest.validation.tokens / 1e6:.1f} M held out",
        highlight=False,
        soft_wrap=True,
    )
    return shards


def _fit_vocabulary(model: ModelConfig, manifest: Manifest) -> ModelConfig:
    """The model's config with its vocabulary set to the tokenizer's, or checked against it."""
    needed = manifest.tokenizer.vocab_size
    if model.vocab_size is None:
        return model.model_copy(update={"vocab_size": needed})
    if model.vocab_size < needed:
        raise UserError(
            f"model.vocab_size ({model.vocab_size}) is smaller than the vocabulary of the tokenizer "
            f"{manifest.tokenizer.name} ({needed}); leave it out to take the tokenizer's"
        )
    return model


def _dataset_info(shards: Shards) -> DatasetInfo:
    manifest = shards.manifest
    splits = {"train": manifest.train, "validation": manifest.validation}
    counts = {
        f"{name}_{what}": getattr(split, what)
        for name, split in splits.items()
        for what in ("documents", "tokens", "text_bytes")
    }
    return DatasetInfo(
        name=manifest.corpus.kind,
        digest=manifest.corpus_digest,
        source=str(shards.folder),
        profile={**counts, "tokenizer": manifest.tokenizer.name, "python": manifest.python},
    )


def _draw(config: RunConfig, folder: RunFolder, progress: RunProgress) -> None:
    """Draw the run's picture while the run is still open, so that its end delivers it."""
    from pipelines.figure import draw_run

    try:
        draw_run(folder, config)
    except OSError as error:
        # A full disk. How the run ended is worth more than its picture.
        progress.say(f"The picture of the run could not be drawn: {error}")


def _print(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command without the rest of the command line."""
    return run_command(TrainArguments, commands.train, argv, "python -m pipelines.train")


if __name__ == "__main__":
    sys.exit(run_in_job(main))
