"""What a study will cost, before it starts: steps and tokens exactly, time by a short measurement."""

import time
from dataclasses import dataclass
from statistics import median

from moe.config.trainer import ParallelConfig
from moe.parallel import join
from moe.trainer import Trainer
from pipelines.config import RunConfig
from pipelines.data import TokenDataset, TrainBatches
from pipelines.shards import Shards

# The first steps carry start-up: allocations, first kernels, the optimizer's lazy imports.
_WARM_UP_STEPS = 3
_STEPS = 8


@dataclass(frozen=True)
class Cost:
    """One block: a seed through every arm and point."""

    trials: int
    steps: int
    tokens: int
    slots: int
    """Trials at a time."""
    seconds: float
    """Of the whole block, an estimate."""

    @property
    def seconds_per_trial(self) -> float:
        """On the mean, an estimate."""
        return self.seconds * self.slots / self.trials


def block_cost(configs: list[RunConfig], shards: Shards, slots: int) -> Cost:
    """The cost of the trials with these configs, ``slots`` at a time, by steps of the first of them on this machine."""
    steps = [config.steps for config in configs]
    tokens = [config.tokens for config in configs]
    per_token = _seconds_per_step(configs[0], shards) / (tokens[0] / steps[0])
    return Cost(len(configs), sum(steps), sum(tokens), slots, sum(tokens) * per_token / slots)


def _seconds_per_step(config: RunConfig, shards: Shards) -> float:
    """On one process with all experts; ranks divide the work among them."""
    alone = config.model_copy(update={"parallel": ParallelConfig(threads=config.parallel.threads, device="cpu")})
    dataset = TokenDataset(shards.train, config.data.sequence_length, config.model.mtp.depth)
    trainer = Trainer(alone, join(alone.parallel), TrainBatches(dataset, alone, rank=0, world=1))
    times = []
    for _ in range(_WARM_UP_STEPS + _STEPS):
        started = time.perf_counter()
        trainer.step()
        times.append(time.perf_counter() - started)
    return median(times[_WARM_UP_STEPS:]) / config.parallel.workers
