"""A run that takes a second: the micro preset on a few packages of the standard library."""

import sysconfig
from pathlib import Path
from typing import Any

from moe.parallel import join
from pipelines.config import RunConfig
from pipelines.loading import load_config
from pipelines.loop import train
from pipelines.outcome import Ending
from pipelines.prepare import prepare
from pipelines.run_folder import RunFolder

STDLIB = Path(sysconfig.get_path("stdlib"))
# Over a hundred files, so that some are held out whatever the interpreter's version.
PACKAGES = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "xml")

SETTINGS = (
    "data.corpus.kind=files",
    f"data.corpus.paths=[{', '.join(str(STDLIB / package) for package in PACKAGES)}]",
    "data.global_batch_size=8",
    "schedule.steps=12",
    "schedule.warmup_steps=2",
    "validation.every_steps=5",
    "validation.max_tokens=2048",
    "checkpoint.every_steps=4",
    "parallel.device=cpu",
)


def small_config(*settings: str) -> RunConfig:
    """The micro preset, made smaller, with ``settings`` on top."""
    return load_config(["micro"], [*_without(settings), *settings])


def _without(settings: tuple[str, ...]) -> list[str]:
    """The settings of which none of ``settings`` sets the key, or a section that it lies in."""
    taken = {setting.partition("=")[0] for setting in settings}

    def is_taken(key: str) -> bool:
        return any(key == other or key.startswith(f"{other}.") for other in taken)

    return [setting for setting in SETTINGS if not is_taken(setting.partition("=")[0])]


def run_loop(rank: int, world: int, folder: Path, settings: tuple[str, ...]) -> Ending:
    """Run the training loop on this rank, without Ray; the process group must be up if ``world`` is above 1."""
    config = small_config(f"parallel.workers={world}", *settings)
    shards = prepare(config.data)
    model = config.model.model_copy(update={"vocab_size": shards.manifest.tokenizer.vocab_size})
    config = config.model_copy(update={"model": model})
    return train(config, join(config.parallel), shards, RunFolder(folder))


def metrics_of(folder: Path, kind: str = "train") -> dict[int, dict[str, Any]]:
    """Metrics by step, without those that measure time."""
    from pipelines.spool import SpoolReader

    records = SpoolReader(RunFolder(folder).spool).read()
    timed = {"train/tokens_per_second"}
    return {r.step: {k: v for k, v in r.metrics.items() if k not in timed} for r in records if r.kind == kind}
