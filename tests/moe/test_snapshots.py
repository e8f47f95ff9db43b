"""Snapshots of the whole state in memory, and training on from them."""

from typing import Any

import pytest
import torch

from moe.snapshots import SnapshotMemoryError, SnapshotRing
from moe.state import is_finite
from tests.distributed import run_distributed
from tests.moe.tiny import MTP, PADDED, assert_bit_identical, local, saved, tiny_config, tiny_trainer

ROOM = 2.0**30


def replay(rank: int, world: int, parallel: dict[str, Any]) -> tuple[Any, Any]:
    trainer = tiny_trainer(tiny_config(MTP, {"parallel": {"workers": world, **parallel}}), PADDED)
    ring = SnapshotRing(trainer.state, 2, ROOM)
    for _ in range(4):
        ring.take(trainer.steps_done)
        trainer.step()
    assert ring.steps == [2, 3]

    def go() -> Any:
        return [trainer.step().metrics for _ in range(2)], saved(trainer)[0]

    trainer.restore(ring.restore(2))  # type: ignore[arg-type]
    assert ring.steps == [2]
    first = go()
    trainer.restore(ring.restore(2))  # type: ignore[arg-type]
    assert trainer.steps_done == 2
    return first, go()


@pytest.mark.parametrize(
    ("world", "parallel"), [(1, {}), (2, {"expert_parallel": 2, "dense": "shard"})], ids=["alone", "ep2-sharded"]
)
def test_training_goes_on_from_a_snapshot_bit_for_bit(world: int, parallel: dict[str, Any]) -> None:
    for first, again in run_distributed(replay, world, parallel):
        assert_bit_identical(first, again)


def test_a_snapshot_is_a_copy_and_the_oldest_gives_its_memory_to_the_next() -> None:
    trainer = tiny_trainer(tiny_config())
    ring = SnapshotRing(trainer.state, 2, ROOM)
    name, live = next(iter(trainer.state().tensors.items()))
    values = []
    for step in range(4):
        local(live).fill_(float(step))
        ring.take(step)
        values.append(step)
    assert ring.steps == values[-2:]
    local(live).fill_(-1.0)
    ring.restore(3)
    assert (local(trainer.state().tensors[name]) == 3.0).all()
    ring.restore(2)
    assert (local(trainer.state().tensors[name]) == 2.0).all()
    with pytest.raises(KeyError, match="no snapshot of step 3"):
        ring.restore(3)


def test_snapshots_that_take_more_memory_than_they_may_are_refused_with_the_arithmetic() -> None:
    trainer = tiny_trainer(tiny_config())
    size = sum(local(tensor).nbytes for tensor in trainer.state().tensors.values())
    SnapshotRing(trainer.state, 3, 3 * size)
    with pytest.raises(SnapshotMemoryError, match=r"3 snapshots of .* GiB each take .* GiB of a worker's memory"):
        SnapshotRing(trainer.state, 3, 3 * size - 1)


def finite_on(rank: int, world: int) -> tuple[bool, bool]:
    trainer = tiny_trainer(tiny_config({"parallel": {"workers": world, "expert_parallel": world}}))
    before = is_finite(trainer.state(), trainer.ranks)
    if rank == 1:
        with torch.no_grad():
            trainer.model.moe_layers()[0].experts.w_up[0, 0, 0] = float("inf")
    return before, is_finite(trainer.state(), trainer.ranks)


def test_every_rank_is_told_of_a_value_that_is_not_finite_on_one() -> None:
    assert run_distributed(finite_on, 2) == [(True, False)] * 2
