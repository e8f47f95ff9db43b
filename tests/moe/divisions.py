"""Trains several cases on every rank of one process group, and compares them with one process."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moe.trainer import Trainer
from tests.distributed import run_distributed
from tests.moe.tiny import MTP, load, relative_difference, same_bits, saved, tiny_config, tiny_trainer, weights

Cases = dict[str, list[dict[str, Any]]]
"""Changes to the tiny config, by the name of the case."""

STEPS = 5
PADDED = (1, 3)
DIVISIONS: dict[str, dict[str, Any]] = {
    "replicas": {},
    "ep2": {"expert_parallel": 2},
    "sharded": {"dense": "shard"},
    "ep2-sharded": {"expert_parallel": 2, "dense": "shard"},
}
"""What two ranks hold."""

by_division = pytest.mark.parametrize(
    "division", [pytest.param(name, marks=pytest.mark.slow if name != "ep2-sharded" else ()) for name in DIVISIONS]
)
"""A test of every division: by default of the one that divides most, the others with the slow tests."""
by_corner = pytest.mark.parametrize("division", ["ep2-sharded", pytest.param("replicas", marks=pytest.mark.slow)])
"""Where the divisions between add nothing: that which divides most, and with the slow tests that which divides nothing.
"""


@dataclass
class Run:
    metrics: list[dict[str, float]]
    update_norm: float
    """Of the whole weights, from before the last step to after it."""
    weights: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    """Everything that is saved, whole."""
    scalars: dict[str, Any]


def whole_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every tensor of the state, whole. Plain ones must have equal bits on every rank. Collective."""
    tensors = trainer.state().tensors
    plain = {name: t.detach().clone() for name, t in tensors.items() if not isinstance(t, DTensor)}
    if trainer.ranks.world > 1:
        held: list[Any] = [None] * trainer.ranks.world
        dist.all_gather_object(held, plain)
        for other in held:
            assert [n for n, t in other.items() if not same_bits(t, plain[n])] == [], "differ between ranks"
    return plain | {name: t.full_tensor().detach().clone() for name, t in tensors.items() if isinstance(t, DTensor)}


def train(rank: int, world: int, cases: Cases, parallel: dict[str, Any]) -> dict[str, Run]:
    """Some steps of each case on this rank, two of them with padding; micro-batches of 2 where there are ranks."""
    runs = {}
    for name, changes in cases.items():
        micro = {"micro_batch_size": 2 if world > 1 else None}
        division = {"parallel": {"workers": world, **parallel}, "data": micro}
        trainer = tiny_trainer(tiny_config(MTP, division, *changes), PADDED)
        reports = [trainer.step() for _ in range(STEPS - 1)]
        before = weights(trainer)
        reports.append(trainer.step())
        assert all(report.taken for report in reports)
        after = weights(trainer)
        changed = [(after[n].double() - before[n].double()) for n in after if "expert_bias" not in n]
        norm = math.sqrt(sum(float(c.square().sum()) for c in changed))
        metrics = [report.metrics for report in reports]
        runs[name] = Run(metrics, norm, after, whole_state(trainer), dict(trainer.state().scalars))
    return runs


@dataclass(frozen=True)
class Tolerance:
    """Largest relative difference; a tensor's is that of its L2 norm."""

    figures: float = 1e-5
    weights: float = 1e-5
    moments: float = 1e-4
    """The second is a square."""


def assert_same_training(
    runs: list[dict[str, Run]], expected: dict[str, Run], tolerances: Mapping[str, Tolerance]
) -> None:
    """Figures, weights and state of every rank against those of one process, case by case."""
    for name, want in expected.items():
        for rank in runs:
            assert rank[name].metrics == runs[0][name].metrics, (name, "ranks report different figures")
        got, tolerance = runs[0][name], tolerances.get(name, Tolerance())
        assert got.scalars == want.scalars
        assert got.metrics[-1]["train/update_norm"] == pytest.approx(got.update_norm, rel=1e-3)
        for step, metrics in enumerate(want.metrics):
            for key, value in metrics.items():
                if "bytes" not in key:
                    assert got.metrics[step][key] == pytest.approx(value, rel=tolerance.figures, abs=1e-9), (
                        name,
                        step,
                        key,
                    )
        for key, weight in want.weights.items():
            assert relative_difference(got.weights[key], weight) < tolerance.weights, (name, key)
        assert got.state.keys() == want.state.keys()
        for key, tensor in want.state.items():
            assert tensor.dtype == got.state[key].dtype
            largest = tolerance.moments if key.startswith("optimizer.") else tolerance.weights
            assert relative_difference(got.state[key], tensor) < largest, (name, key)


def resumed(rank: int, world: int, cases: Cases, parallel: dict[str, Any], after: tuple[int, ...]) -> list[str]:
    """Runs that do not continue bit for bit from the state after each number of steps in ``after``."""
    broken = []
    for name, changes in cases.items():
        config = tiny_config(MTP, {"parallel": {"workers": world, **parallel}}, *changes)
        trainer = tiny_trainer(config, PADDED)
        states, metrics = {}, []
        for step in range(STEPS):
            if step in after:
                states[step] = saved(trainer)
            metrics.append(trainer.step().metrics)
        end = saved(trainer)[0]
        other = tiny_trainer(config.model_copy(update={"seed": 99}), PADDED)
        other.step()
        for step, (tensors, scalars) in states.items():
            load(other, tensors, scalars)
            again = [other.step().metrics for _ in range(step, STEPS)]
            final = saved(other)[0]
            if again != metrics[step:] or not all(same_bits(end[key], final[key]) for key in end):
                broken.append(f"{name} after {step} steps")
    return broken


def refused(rank: int, world: int, cases: Cases, parallel: dict[str, Any]) -> list[str]:
    """Cases whose state a step with an infinite gradient on the last rank changes."""
    broken = []
    for name, changes in cases.items():
        trainer = tiny_trainer(tiny_config(MTP, {"parallel": {"workers": world, **parallel}}, *changes))

        def explode(gradient: torch.Tensor, trainer: Trainer = trainer) -> torch.Tensor:
            last = trainer.ranks.rank == trainer.ranks.world - 1
            return gradient * (float("inf") if last and trainer.steps_done == 2 else 1.0)

        trainer.model.moe_layers()[0].experts.w_up.register_hook(explode)
        trainer.step()
        trainer.step()
        before, scalars = saved(trainer)
        report = trainer.step()
        after, scalars_after = saved(trainer)
        same = all(same_bits(before[key], after[key]) for key in before)
        if report.taken or not same or scalars_after != {**scalars, "steps_done": scalars["steps_done"] + 1}:
            broken.append(name)
        assert trainer.step().taken
    return broken


def reference(cases: Cases) -> dict[str, Run]:
    """The cases in one process, each batch at once."""
    [runs] = run_distributed(train, 1, cases, {}, timeout_s=120)
    assert isinstance(runs, dict)
    return runs


def runs_of(cases: Cases, division: str) -> list[dict[str, Run]]:
    """The cases on two ranks."""
    return run_distributed(train, 2, cases, DIVISIONS[division], timeout_s=240)
