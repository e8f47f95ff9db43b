"""Losses and gradient norms of runs that nothing disturbs, for the benchmark of the spike detector.

    python -m tests.benchmarks.clean_traces FILE SEED...

Trains preset micro with recipes/recommended on the default corpus once for each seed, one after the other, and
writes every step's training loss and gradient norm before clipping to FILE (.npz, fp32 [seeds, steps]), with where they
come from.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from moe.parallel import join
from pipelines.history import History
from pipelines.loading import load_config
from pipelines.loop import train
from pipelines.prepare import prepare
from pipelines.run_folder import RunFolder
from pipelines.text import fit_to_text

_PRESETS = ["micro", "recipes/recommended"]
_SETTINGS = ["schedule.steps=2500", "schedule.warmup_steps=125", "parallel.device=cpu", "monitors.every_steps=0",
             "validation.every_steps=2500", "checkpoint.every_steps=0", "checkpoint.at_end=false"]  # fmt: skip


def trace(seed: int, folder: Path) -> tuple[list[float], list[float]]:
    """Training losses and gradient norms of every step."""
    config = load_config(_PRESETS, [*_SETTINGS, f"seed={seed}"])
    shards = prepare(config.data)
    config = fit_to_text(config, shards)
    train(config, join(config.parallel), shards, RunFolder(folder))
    series = History.read(RunFolder(folder).spool).series
    return series["train/loss"].values, series["train/grad_norm"].values


def main(path: Path, seeds: list[int]) -> None:
    """Train and write."""
    losses, norms = [], []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            loss, norm = trace(seed, Path(folder))
        losses.append(loss)
        norms.append(norm)
        print(f"seed {seed}: {len(loss)} steps, loss {loss[-1]:.3f}", flush=True)
    about = {"presets": _PRESETS, "settings": _SETTINGS, "seeds": seeds, "made_by": "tests/benchmarks/clean_traces.py"}
    np.savez_compressed(
        path,
        loss=np.array(losses, np.float32),
        grad_norm=np.array(norms, np.float32),
        about=np.array(json.dumps(about)),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]])
