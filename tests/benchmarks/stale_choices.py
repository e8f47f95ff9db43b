"""How fast choices of experts go stale: the share that the weights of some steps later would make otherwise.

    python -m tests.benchmarks.stale_choices [STEPS] [KEY=VALUE ...]

Trains the preset micro, without anticipatory routing unless a setting says otherwise, on a part of Python's standard
library. Every tenth step's batch is looked at beforehand, by the weights of 1, 4, 16 and 64 steps before it; a row is
a tenth of the run, with the mean share for each of these lags.
"""

import sys
from statistics import fmean

import torch

from moe.parallel import join
from moe.trainer import Trainer
from pipelines.data import TokenDataset, TrainBatches
from pipelines.prepare import prepare
from pipelines.text import fit_to_text
from tests.pipelines.small_run import small_config

_LAGS = (1, 4, 16, 64)
_EVERY = 10
_ROWS = 10


def stale_shares(trainer: Trainer, steps: int) -> dict[int, dict[int, float]]:
    """By lag and step (from 0) of so many, the share of (token, layer) decisions for another set of experts.

    Both choices are made without gradients by whole models, each layer on what that model's earlier layers give.
    """
    waiting: dict[tuple[int, int], list[torch.Tensor]] = {}
    shares: dict[int, dict[int, float]] = {lag: {} for lag in _LAGS}
    for step in range(steps):
        for lag in _LAGS:
            if (step + lag) % _EVERY == 0 and step + lag < steps:
                waiting[step + lag, lag] = trainer.choose(step + lag)
        if step % _EVERY == 0:
            today = torch.stack(trainer.choose(step))
            for lag in _LAGS:
                if (then := waiting.pop((step, lag), None)) is not None:
                    shares[lag][step] = float((torch.stack(then) != today).any(dim=-1).double().mean())
        trainer.step()
    return shares


def main(steps: int, settings: list[str]) -> None:
    """Print the curve."""
    config = small_config(f"schedule.steps={steps}", "schedule.warmup_steps=20", *settings)
    shards = prepare(config.data)
    config = fit_to_text(config, shards)
    dataset = TokenDataset(shards.train, config.data.sequence_length, config.model.mtp.depth)
    ranks = join(config.parallel)
    shares = stale_shares(Trainer(config, ranks, TrainBatches(dataset, config, ranks.rank, ranks.world)), steps)
    print("steps".ljust(14), *(f"lag {lag}".rjust(8) for lag in _LAGS))
    for first in range(0, steps, max(1, steps // _ROWS)):
        last = min(steps, first + max(1, steps // _ROWS))
        found = [[share for step, share in shares[lag].items() if first <= step < last] for lag in _LAGS]
        print(f"{first} to {last - 1}".ljust(14), *(f"{fmean(s):8.3f}" if s else " " * 8 for s in found))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400, sys.argv[2:])
