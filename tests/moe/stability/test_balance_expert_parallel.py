"""Every switch of balance, balance loss, z-loss and affinity trains the same on any division of the ranks.

One process is the reference. All runs have two micro-batches, padding, multi-token prediction and clipping. Micro-batch
i of the reference is what micro-batch i of all ranks holds: the batch-wise loss counts up to it.
"""

import functools
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe.batch import Batch
from moe.config.trainer import TrainerConfig
from moe.trainer import Trainer
from tests.distributed import run_distributed
from tests.moe.tiny import (
    MTP,
    assert_bit_identical,
    global_batch,
    gradients,
    load,
    relative_difference,
    same_bits,
    saved,
    share_of,
    tiny_config,
    tiny_trainer,
    trained,
    weights,
)

STEPS = 3
PADDED = (1, 2)
SCHEDULE = {"warmup_steps": 2, "decay_steps": 2}

SWITCHES: dict[str, dict[str, Any]] = {
    "proportional": {"balance": {"kind": "proportional", "bias_update_rate": 3e-2}},
    "smebu": {"balance": {"kind": "smebu", "bias_update_rate": 2e-2}},
    "quantile": {"balance": {"kind": "quantile", "smoothing": 0.3}},
    "schedule": {"balance": {"kind": "sign", "bias_update_rate": 1e-2, "schedule": SCHEDULE}},
    "batch loss": {"balance_loss": {"kind": "batch", "coefficient": 5e-2}},
    "router z-loss": {"router_z_loss": {"coefficient": 2e-2}},
    "lm z-loss": {"lm_z_loss": {"coefficient": 1e-2}},
}
TOGETHER: dict[str, Any] = {
    "balance": {"kind": "smebu", "schedule": SCHEDULE},
    **{switch: SWITCHES[name][switch] for name, switch in [("batch loss", "balance_loss"), ("lm z-loss", "lm_z_loss")]},
    **SWITCHES["router z-loss"],
}
CHANGES: dict[str, dict[str, Any]] = {name: {"stability": stability} for name, stability in SWITCHES.items()}
CHANGES["sqrt_softplus"] = {"model": {"moe": {"affinity": "sqrt_softplus"}}}
CHANGES["sqrt_softplus, quantile, batch loss"] = {
    "model": {"moe": {"affinity": "sqrt_softplus"}},
    "stability": {**SWITCHES["quantile"], **SWITCHES["batch loss"]},
}
CHANGES["together"] = {"stability": TOGETHER}

LAYOUTS: dict[str, dict[str, Any]] = {
    "replicas": {"expert_parallel": 1},
    "ep2": {"expert_parallel": 2},
    "ep2-sharded": {"expert_parallel": 2, "dense": "shard"},
}
# Each loss is a figure of its own, so that all of them at once are told apart; of biases there is one kind at a time.
# On one layout every kind, and on the others those that between them have every form of state and loss.
COMBINED = ("sqrt_softplus, quantile, batch loss", "together")
ALONE_IN_NONE = ("batch loss", "router z-loss", "lm z-loss")
TRAINED: dict[str, tuple[str, ...]] = {
    "replicas": ("proportional", *COMBINED),
    "ep2": tuple(name for name in CHANGES if name not in ALONE_IN_NONE),
    "ep2-sharded": ("schedule", *COMBINED),
}


def config_of(name: str, world: int, parallel: dict[str, Any]) -> TrainerConfig:
    # Micro-batches of 4 sequences over all ranks, whatever their number.
    data = {"data": {"micro_batch_size": 4 // world}, "schedule": {"steps": 4}}
    return tiny_config(MTP, {"parallel": {"workers": world, **parallel}}, data, CHANGES[name])


def joined(parts: list[Batch]) -> Batch:
    ids_BL = torch.cat([part.ids_BL for part in parts])
    real = [part.real_BL for part in parts if part.real_BL is not None]
    return Batch(ids_BL, torch.cat(real) if real else None)


def batches(config: TrainerConfig, rank: int, step: int) -> list[Batch]:
    """The micro-batches of a rank; of one process, those that two ranks would have, joined."""
    batch = global_batch(config, step, padded=step in PADDED)
    if config.parallel.workers == 2:
        return share_of(batch, config, rank)
    halves = config_of("proportional", 2, {})
    return [joined([*parts]) for parts in zip(*(share_of(batch, halves, r) for r in range(2)), strict=True)]


def trainer_of(name: str, rank: int, world: int, parallel: dict[str, Any]) -> Trainer:
    config = config_of(name, world, parallel)
    trainer = tiny_trainer(config)
    trainer.batches = partial(batches, config, rank)
    return trainer


def train(rank: int, world: int, parallel: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Switch -> (figures of each step, gradients of each step, weights and biases, state of techniques)."""
    runs = {}
    for name in names:
        trainer = trainer_of(name, rank, world, parallel)
        figures, found = [], []
        for _ in range(STEPS):
            report = trainer.step()
            assert report.taken
            figures.append(report.metrics)
            found.append(gradients(trainer))
        state = {key: t.clone() for key, t in trainer.state().tensors.items() if key.startswith("stability.")}
        runs[name] = figures, found, weights(trainer), state
    return runs


@functools.cache
def runs_of(world: int, layout: str | None) -> list[dict[str, Any]]:
    parallel, names = (LAYOUTS[layout], TRAINED[layout]) if layout else ({}, tuple(CHANGES))
    return run_distributed(train, world, parallel, names, timeout_s=240)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=() if layout == "ep2" else pytest.mark.slow)
        for layout, names in TRAINED.items()
        for name in names
    ],
)
def test_ranks_train_what_one_process_trains(name: str, layout: str) -> None:
    [expected], got = runs_of(1, None), runs_of(2, layout)
    figures, found, weight, state = expected[name]
    assert got[0][name][0] == got[1][name][0], "ranks report different figures"
    for number in range(STEPS):
        for key, value in figures[number].items():
            if "bytes" not in key:
                assert got[0][name][0][number][key] == pytest.approx(value, rel=1e-5, abs=1e-9), (number, key)
        for key, gradient in found[number].items():
            assert relative_difference(got[0][name][1][number][key], gradient) < 1e-5, (number, key)
    for key, tensor in weight.items():
        assert tensor.any(), key
        assert relative_difference(got[0][name][2][key], tensor) < 1e-5, key
    for rank in got:
        assert rank[name][3].keys() == state.keys()
        assert all(same_bits(rank[name][3][key], got[0][name][3][key]) for key in state)
        assert all(relative_difference(rank[name][3][key], state[key]) < 1e-5 for key in state)


def test_each_switch_makes_a_difference() -> None:
    [runs] = runs_of(1, None)
    finals = [sum(float(weight.double().sum()) for weight in run[2].values()) for run in runs.values()]
    assert len(set(finals)) == len(CHANGES)
    assert all(runs["together"][0][1][f"train/{term}"] > 0 for term in ("balance_loss", "router_z_loss", "lm_z_loss"))
    assert runs["smebu"][3]["stability.balance.momentum_ME"].abs().sum(dim=1).all(), "a layer without momentum"


# ---- resume, refused steps, recomputation ----------------------------------------------------------------------------


def replay(rank: int, world: int, parallel: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Switch -> outcomes of steps 2 and 3: undisturbed, after a rewind, and in a trainer that took the state over."""
    found = {}
    for name in names:
        trainer = trainer_of(name, rank, world, parallel)
        trainer.step()
        tensors, scalars = saved(trainer)
        held_out = share_of(global_batch(trainer.config, 90), trainer.config, rank)
        outcomes: list[Any] = []

        def go(subject: Trainer, outcomes: list[Any] = outcomes, held_out: list[Batch] = held_out) -> None:
            metrics: list[Any] = [subject.step().metrics]
            metrics.append(subject.evaluate(held_out).loss_sum)
            metrics.append(subject.step().metrics)
            outcomes.append((metrics, saved(subject)[0]))

        go(trainer)
        load(trainer, tensors, scalars)
        go(trainer)
        other = Trainer(trainer.config.model_copy(update={"seed": 99}), trainer.ranks, trainer.batches)
        other.step()
        load(other, tensors, scalars)
        go(other)
        found[name] = outcomes
    return found


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        # Losses have no state.
        pytest.param("ep2", ["smebu", "quantile", "together"], id="ep2"),
        pytest.param("ep2-sharded", ["proportional", "schedule", *COMBINED], id="sharded", marks=pytest.mark.slow),
    ],
)
def test_a_saved_state_makes_the_next_steps_bit_identical(layout: str, names: list[str]) -> None:
    for found in run_distributed(replay, 2, LAYOUTS[layout], names, timeout_s=240):
        for undisturbed, rewound, taken_over in found.values():
            assert_bit_identical(undisturbed, rewound)
            assert_bit_identical(undisturbed, taken_over)


def refused_step(rank: int, world: int, names: list[str]) -> dict[str, Any]:
    """Switch -> (taken flags, names of what a step that was not finite on the last rank has changed)."""
    found = {}
    for name in names:
        trainer = trainer_of(name, rank, world, LAYOUTS["ep2"])

        def explode(gradient: torch.Tensor, trainer: Trainer = trainer) -> torch.Tensor:
            bad = trainer.steps_done == 1 and trainer.ranks.rank == trainer.ranks.world - 1
            return gradient * float("inf") if bad else gradient

        trainer.model.moe_layers()[0].experts.w_up.register_hook(explode)
        taken = [trainer.step().taken]
        before = saved(trainer)[0]
        taken.append(trainer.step().taken)
        after = saved(trainer)[0]
        taken.append(trainer.step().taken)
        found[name] = taken, [key for key in before if not same_bits(before[key], after[key])]
    return found


def test_a_step_that_is_not_taken_moves_neither_bias_nor_momentum() -> None:
    for found in run_distributed(refused_step, 2, ["proportional", "smebu", "quantile"]):
        for taken, changed in found.values():
            assert taken == [True, False, True]
            assert not changed


def recompute_layers(trainer: Trainer) -> None:
    for layer in trainer.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@pytest.mark.parametrize("name", ["smebu", "quantile", "batch loss"])
def test_a_recomputed_forward_is_not_counted_again(name: str) -> None:
    changes = [CHANGES[name], {"data": {"micro_batch_size": 4}}]
    assert_bit_identical(trained(changes), trained(changes, recompute_layers))
