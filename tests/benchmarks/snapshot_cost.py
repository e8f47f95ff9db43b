"""What snapshots in memory cost, as a share of training: `python -m tests.benchmarks.snapshot_cost [preset ...]`.

A step and a snapshot of the state after it, in turns on one CPU thread; the share is that of one snapshot every
``response.snapshot_every_steps`` steps, of medians.
"""

import statistics
import sys
import time

from moe.parallel import join
from moe.snapshots import SnapshotRing
from moe.state import local_tensor
from moe.trainer import Trainer
from pipelines.data import TokenDataset, TrainBatches
from pipelines.loading import load_config
from pipelines.prepare import prepare
from pipelines.response_config import LadderResponseConfig

STEPS, WARM_UP = 40, 5
ALONE = ["parallel.workers=1", "parallel.expert_parallel=1", "parallel.device=cpu"]


def measure(preset: str) -> str:
    """A line of the table."""
    config = load_config([preset], ALONE)
    response = LadderResponseConfig()
    shards = prepare(config.data)
    model = config.model.model_copy(update={"vocab_size": shards.manifest.tokenizer.vocab_size})
    config = config.model_copy(update={"model": model})
    dataset = TokenDataset(shards.train, config.data.sequence_length, config.model.mtp.depth)
    trainer = Trainer(config, join(config.parallel), TrainBatches(dataset, config, 0, 1))
    ring = SnapshotRing(trainer.state, response.snapshots, response.memory_gib * 2**30)
    steps, snapshots = [], []
    for number in range(STEPS):
        clock = time.perf_counter()
        trainer.step()
        stepped = time.perf_counter()
        ring.take(number)
        steps.append(stepped - clock)
        snapshots.append(time.perf_counter() - stepped)
    step, snapshot = statistics.median(steps[WARM_UP:]), statistics.median(snapshots[WARM_UP:])
    size = sum(local_tensor(tensor).nbytes for tensor in trainer.state().tensors.values())
    share = snapshot / response.snapshot_every_steps / step
    return f"{preset:<12} {size / 2**20:8.1f} MiB {1e3 * step:9.1f} ms {1e3 * snapshot:9.2f} ms {share:8.2%}"


if __name__ == "__main__":
    print(f"{'preset':<12} {'state':>12} {'step':>12} {'snapshot':>12} {'share':>8}")
    for name in sys.argv[1:] or ["micro", "tiny"]:
        print(measure(name))
