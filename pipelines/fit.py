"""The training of one run by Ray Train workers, as the driver sees it: from their start to how it ended."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from pipelines.config import RunConfig
from pipelines.errors import first_line
from pipelines.interrupts import Interrupts
from pipelines.notes import read_notes
from pipelines.operations import FAILURES, last_step, settle
from pipelines.outcome import Ending
from pipelines.progress import RunProgress
from pipelines.ray_session import uses_gpu, worker_environment
from pipelines.run_folder import RunFolder
from pipelines.run_lock import is_written_to
from pipelines.shards import Shards
from pipelines.worker import WorkerJob, train_worker


def fit(config: RunConfig, shards: Shards, folder: RunFolder, progress: RunProgress, interrupts: Interrupts) -> Ending:
    """Run the workers to the end of training, through their failures and the user's interrupts. Needs a Ray session.

    Raises:
        KeyboardInterrupt: the user does not want to wait, or nothing was trained that could be saved.
    """
    started_ms = time.time_ns() // 1_000_000
    job = WorkerJob(
        config=config.model_dump(mode="json"),
        run_folder=str(folder.path),
        shards=str(shards.folder),
        started_ms=started_ms,
    )
    folder.stop.unlink(missing_ok=True)

    def stop() -> bool:
        # Where nobody trains, as in the first seconds, there is nothing to save.
        if not is_written_to(folder):
            return False
        folder.stop.touch()
        progress.say("Stopping after this step, and saving; a second time ends the run at once, without saving.")
        return True

    try:
        return interrupts.wait(lambda: run_workers(config, folder, started_ms, train_worker, job), stop)
    except KeyboardInterrupt:
        import ray

        # The workers with it: nothing must be written any more when the run is ended.
        ray.shutdown()
        raise
    finally:
        folder.stop.unlink(missing_ok=True)


def run_workers(
    config: RunConfig,
    folder: RunFolder,
    started_ms: int,
    loop: Callable[[Any], dict[str, Any]],
    job: Mapping[str, Any],
) -> Ending:
    """Start the workers of a run with Ray Train, and again when some fail, until their ``loop`` returns.

    Args:
        config: of the run.
        folder: of the run.
        started_ms: when this attempt began, in milliseconds since 1970.
        loop: what each worker does with ``job``; returns an `Ending` as a mapping, the same on every rank.
        job: plain values.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    from pipelines.failures import WorkerFailures
    from pipelines.process_group import torch_config

    gpu = uses_gpu(config)
    trainer = TorchTrainer(
        loop,
        train_loop_config=dict(job),
        torch_config=torch_config("nccl" if gpu else "gloo", config.recovery.stall_timeout_s),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.parallel.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": config.parallel.threads, **({"GPU": 1} if gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name="ray_train",
            storage_path=str(folder.path),
            worker_runtime_env={"env_vars": worker_environment(config)},
            failure_config=ray.train.FailureConfig(max_failures=config.recovery.max_restarts),
            callbacks=[WorkerFailures(folder)],
        ),
    )
    try:
        ending = Ending(**trainer.fit().return_value)
    except ray.train.TrainingFailedError as error:
        ending = Ending("failed", 0, _why(folder, started_ms, config.recovery.max_restarts, error))
    if ending.outcome == "failed":
        settle(folder, FAILURES, last_step(folder.spool), state="aborted")
    return ending


def _why(folder: RunFolder, started_ms: int, max_restarts: int, error: Exception) -> str:
    failures = [n for n in read_notes(folder.notes) if n.time_ms >= started_ms and n.kind in ("death", "error")]
    if not failures:
        return first_line(error)  # of the controller; the workers did not fail
    return f"{failures[-1].text} (after {max_restarts} restarts, recovery.max_restarts)"
