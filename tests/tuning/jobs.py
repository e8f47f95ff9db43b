"""Trials of a second, for the tests of what runs them, and what a plain training loop makes of the same configs."""

from pathlib import Path

from pipelines.prepare import prepare
from pipelines.run_folder import RunFolder
from pipelines.text import fit_to_text
from tests.distributed import run_distributed
from tests.pipelines.small_run import metrics_of, run_loop, small_config
from tuning.recording import read_series
from tuning.trial_rank import TrialJob

# Another model, path and end than the preset's.
OTHER = ("seed=7", "optimizer.lr=1.0e-2", "stability.clip.max_norm=0.1", "data.sequence_length=32")
# The first update throws the weights away.
ABSURD = ("optimizer.lr=1.0e+30", "schedule.warmup_steps=0")
PAIR = ("parallel.workers=2", "parallel.expert_parallel=2")

Recorded = dict[str, dict[int, dict[str, float]]]


def trial_job(folder: Path, *settings: str) -> TrialJob:
    """The micro preset, made smaller, with ``settings`` on top, in a run's folder."""
    config = small_config(*settings)
    shards = prepare(config.data)
    config = fit_to_text(config, shards)
    return TrialJob(config=config.model_dump(mode="json"), run_folder=str(folder), shards=str(shards.folder))


def by_the_loop(folder: Path, *settings: str, workers: int = 1) -> Recorded:
    """What `pipelines.loop.train` records of a config, in processes that have trained nothing before."""
    run_distributed(run_loop, workers, folder, settings)
    return recorded(folder)


def recorded(folder: Path) -> Recorded:
    """All that a run has recorded, but for times."""
    return {kind: metrics_of(folder, kind) for kind in ("train", "validation")}


def losses_in_series(folder: Path) -> list[float]:
    """What a study reads of a trial."""
    return list(read_series(RunFolder(folder)).train["train/loss"])


def rounded(losses: dict[int, dict[str, float]]) -> list[float]:
    """The training losses of all steps, which must be there from step 1, as a series keeps them."""
    assert sorted(losses) == list(range(1, len(losses) + 1))
    return [float(f"{losses[step]['train/loss']:.6g}") for step in sorted(losses)]
