"""One seed gives the same bits again, and a saved state the same next steps."""

from typing import Any

import pytest
import torch

from moe.trainer import Trainer
from tests.distributed import run_distributed
from tests.moe.tiny import (
    MTP,
    PADDED,
    assert_bit_identical,
    global_batch,
    load,
    saved,
    share_of,
    tiny_config,
    tiny_trainer,
    trained,
)


def test_a_b_a_in_one_process_gives_a_bit_for_bit() -> None:
    a = trained([])
    b = trained([{"seed": 5, "model": {"num_layers": 2}, "optimizer": {"lr": 1e-2}}])
    assert a[0] != b[0]
    assert_bit_identical(a, trained([]))


def trained_on_ranks(rank: int, world: int) -> Any:
    trainer = tiny_trainer(tiny_config(MTP, {"parallel": {"workers": world, "expert_parallel": world}}), PADDED)
    return [trainer.step().metrics for _ in range(3)], saved(trainer)[0]


def test_two_runs_of_one_seed_are_bit_identical() -> None:
    for a, b in zip(run_distributed(trained_on_ranks, 2), run_distributed(trained_on_ranks, 2), strict=True):
        assert_bit_identical(a, b)


def replay(rank: int, world: int, parallel: dict[str, Any]) -> Any:
    """Metrics of steps 3-5: undisturbed, after a rewind in place, and in another trainer that took the state over."""
    config = tiny_config(MTP, {"parallel": {"workers": world, **parallel}})
    trainer = tiny_trainer(config, PADDED)
    held_out = share_of(global_batch(config, 90), config, rank)
    for _ in range(2):
        trainer.step()
    tensors, scalars = saved(trainer)
    outcomes = []

    def go(subject: Trainer) -> None:
        metrics: list[Any] = [subject.step().metrics for _ in range(3)]
        metrics.append(subject.evaluate(held_out).loss_sum)
        outcomes.append((metrics, saved(subject)[0]))

    go(trainer)
    load(trainer, tensors, scalars)
    go(trainer)
    another_seed = tiny_config(MTP, {"parallel": {"workers": world, **parallel}, "seed": 99})
    other = Trainer(another_seed, trainer.ranks, trainer.batches)
    other.step()
    other.evaluate(held_out)
    load(other, tensors, scalars)
    go(other)
    names = trainer.state().tensors.keys()
    parameters = [name for name, _ in trainer.model.named_parameters()]
    wanted = {f"model.{name}" for name in [*parameters, *(name for name, _ in trainer.model.named_buffers())]}
    wanted |= {f"optimizer.{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in parameters}
    return outcomes, wanted - names


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(1, {}), (2, {"expert_parallel": 2}), (2, {"expert_parallel": 2, "dense": "shard"})],
    ids=["alone", "ep2", "ep2-sharded"],
)
def test_the_state_makes_the_next_steps_bit_identical(world: int, parallel: dict[str, Any]) -> None:
    for outcomes, missing in run_distributed(replay, world, parallel):
        assert not missing
        undisturbed, rewound, taken_over = outcomes
        assert_bit_identical(undisturbed, rewound)
        assert_bit_identical(undisturbed, taken_over)


def test_state_tensors_are_live() -> None:
    trainer = tiny_trainer(tiny_config(MTP))
    before = {name: tensor.clone() for name, tensor in trainer.state().tensors.items()}
    held = trainer.state().tensors
    trainer.step()
    # A calm step gives the detector nothing to keep out of its past.
    same = [name for name in before if torch.equal(held[name], before[name])]
    assert same == [f"detector.{series}.kept_out" for series in ("loss", "grad_norm", "max_vio")]
