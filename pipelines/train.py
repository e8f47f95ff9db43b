"""The driver of a training run: text to tokens, a tracked run, Ray Train workers, and what the user sees of it.

``python -m pipelines.train tiny`` takes the arguments of ``steadymoe train``, for ``ray job submit``.
"""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from moe.config.model import ModelConfig
from pipelines import commands
from pipelines.arguments import TrainArguments
from pipelines.command_line import EXIT_DONE, EXIT_ENDED_BY_POLICY, EXIT_INTERRUPTED, run_command
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.loading import load_config
from pipelines.prepare import prepare
from pipelines.progress import RunProgress
from pipelines.ray_session import ray_session, uses_gpu, worker_environment
from pipelines.run_folder import RunFolder, find_run
from pipelines.shards import Manifest, Shards
from pipelines.summary import print_summary
from pipelines.tracking import DatasetInfo, Tracker
from pipelines.tracking_store import open_store_in_background, tracking_uri
from pipelines.worker import WorkerJob, train_worker

if TYPE_CHECKING:
    from pipelines.loop import Ending

# A collective that takes longer than this has lost a peer; torch waits 30 minutes otherwise.
_COLLECTIVE_TIMEOUT_S = 300


def run(arguments: TrainArguments) -> int:
    """One training run, new or resumed; returns the exit code.

    Raises:
        UserError: config, text, tracking store or cluster do not allow the run.
    """
    started = time.monotonic()
    console = Console()
    resumed = find_run(arguments.resume) if arguments.resume else None
    config = load_config([str(resumed.config)], arguments.settings) if resumed else arguments.config()
    info = resumed.info if resumed else None
    # Importing MLflow takes seconds, and so does starting Ray.
    opening = open_store_in_background(tracking_uri(config.tracking, info))
    shards = _prepare(config, console)
    config = config.model_copy(update={"model": _fit_vocabulary(config.model, shards.manifest)})
    with ray_session(config):
        tracker = Tracker.start(
            config,
            opening.result(),
            dataset=_dataset_info(shards),
            preset=arguments.presets[0],
            resume=resumed,
        )
        with tracker, RunProgress(tracker.folder.spool, config.schedule.steps, console) as progress:
            progress.phase(f"starting {config.parallel.workers} Ray Train worker(s)")
            ending = _fit(config, shards, tracker.folder)
            if ending.outcome == "diverged":
                tracker.end_as("FAILED", ending.reason)
            elif ending.outcome == "stopped":
                tracker.end_as("KILLED", ending.reason)
            _draw(config, tracker.folder)
    print_summary(tracker.folder, time.monotonic() - started, console)
    if tracker.undelivered:
        console.print(tracker.undelivered, soft_wrap=True, highlight=False, markup=False)
    return _exit_code(ending, console)


def _prepare(config: RunConfig, console: Console) -> Shards:
    """The token shards; a corpus that is not known yet is made into them with a progress bar."""
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("preparing text", total=None, visible=False)
        shards = prepare(config.data, lambda done, total: bar.update(task, completed=done, total=total, visible=True))
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


def _fit(config: RunConfig, shards: Shards, folder: RunFolder) -> "Ending":
    """Run the workers to the end of training."""
    from ray.train import RunConfig as RayRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.loop import Ending

    gpu = uses_gpu(config)
    job = WorkerJob(config=config.model_dump(mode="json"), run_folder=str(folder.path), shards=str(shards.folder))
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=dict(job),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=config.parallel.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": config.parallel.threads, **({"GPU": 1} if gpu else {})},
        ),
        run_config=RayRunConfig(
            name="ray_train",
            storage_path=str(folder.path),
            worker_runtime_env={"env_vars": worker_environment(config)},
        ),
    )
    return Ending(**trainer.fit().return_value)


def _draw(config: RunConfig, folder: RunFolder) -> None:
    """Draw the run's picture while the run is still open, so that its end delivers it."""
    from pipelines.figure import draw_run

    draw_run(folder, config)


def _exit_code(ending: "Ending", console: Console) -> int:
    if ending.outcome == "finished":
        return EXIT_DONE
    console.print(f"The run ended early: {ending.reason}.", highlight=False)
    return EXIT_ENDED_BY_POLICY if ending.outcome == "diverged" else EXIT_INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """The command without the rest of the command line."""
    return run_command(TrainArguments, commands.train, argv, "python -m pipelines.train")


if __name__ == "__main__":
    sys.exit(main())
