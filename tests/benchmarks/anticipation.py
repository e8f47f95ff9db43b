"""What anticipatory routing costs: the time of a step with it, at full lag, against that of a step without.

    python -m tests.benchmarks.anticipation [PAIRS]

One process and one thread, the size of preset tiny, random tokens. Steps of both kinds take turns, so that both see the
same machine. Printed are the medians with their quartiles, and the median of the pairs' ratios with its.
"""

import sys
import time
from statistics import quantiles

import torch

from moe.batch import Batch
from moe.config.trainer import TrainerConfig
from moe.parallel import join
from moe.trainer import Trainer
from pipelines.loading import load_config

_VOCABULARY = 2048
_LAG = 4


def _trainer(*settings: str) -> Trainer:
    fixed = ("parallel.workers=1", "parallel.expert_parallel=1", "parallel.device=cpu", "monitors.every_steps=0",
             f"model.vocab_size={_VOCABULARY}", "schedule.steps=100000")  # fmt: skip
    config: TrainerConfig = load_config(["tiny"], [*fixed, *settings])

    def batches(step: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(step)
        shape = (config.data.global_batch_size, config.data.sequence_length + 1)
        return [Batch((torch.rand(shape, generator=generator) ** 3 * _VOCABULARY).long())]

    return Trainer(config, join(config.parallel), batches)


def _seconds(trainer: Trainer) -> float:
    clock = time.perf_counter()
    trainer.step()
    return time.perf_counter() - clock


def main(pairs: int) -> None:
    """Run the benchmark and print the ratio."""
    without, with_it = _trainer(), _trainer("stability.anticipation.kind=always", f"stability.anticipation.lag={_LAG}")
    for _ in range(_LAG + 1):  # the queue fills
        _seconds(without), _seconds(with_it)
    times = [(_seconds(without), _seconds(with_it)) for _ in range(pairs)]
    for name, values in [
        ("without, s:", [a for a, _ in times]),
        ("with, s:   ", [b for _, b in times]),
        ("ratio:     ", [b / a for a, b in times]),
    ]:
        low, middle, high = quantiles(values, n=4)
        print(f"{name} {middle:.3f}, quartiles {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
