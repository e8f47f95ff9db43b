"""Every technique does the same on any division of the ranks, and continues where its state was saved."""

import functools
from typing import Any

import pytest

from moe.config.clip import AdaGcClipConfig
from moe.stability.clip import CLIP
from moe.trainer import Trainer
from moe.units import Units
from tests.distributed import run_distributed
from tests.moe.divisions import (
    DIVISIONS,
    Cases,
    Run,
    assert_same_training,
    by_division,
    reference,
    refused,
    resumed,
    runs_of,
)
from tests.moe.tiny import saved, tiny_config, tiny_trainer

# Each made to act within five steps.
KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "global": {"max_norm": 0.5},
    "group": {"max_norm": 0.3, "router_max_norm": 0.01, "experts_max_norm": 0.05},
    "zclip": {"warmup_steps": 2, "z_threshold": 0.1, "decay": 0.9, "max_norm": None},
    "adagc": {"warmup_steps": 2, "warmup_max_norm": 0.5},
    "spam": {"threshold": 4.0, "reset_every_steps": 3, "rewarmup_steps": 2, "settle_steps": 1},
    "stable_spam": {"max_decay": 0.9, "reset_every_steps": 3},
}
CASES: Cases = {kind: [{"stability": {"clip": {"kind": kind, **keys}}}] for kind, keys in KINDS.items()}
# Every other test of ranks trains with a global clip.
OF_THIS_FILE = {kind: CASES[kind] for kind in KINDS if kind not in ("none", "global")}
# The others remember nothing: their state is that of any training.
REMEMBERING = {kind: CASES[kind] for kind in ("zclip", "adagc", "spam", "stable_spam")}
AROUND_A_RESET = (2, 3, 4)
"""The third update is the reset's: states before it, after it, and one later. For warm-ups of 2, at their end."""


@functools.cache
def one_process() -> dict[str, Run]:
    return reference(CASES)


def test_every_kind_is_compared_and_acts() -> None:
    assert KINDS.keys() == {config.model_fields["kind"].default for config in CLIP}
    runs = one_process()
    for kind, run in runs.items():
        clipped = [step.get("train/clipped") for step in run.metrics]
        if kind == "none":
            assert clipped == [None] * 5
            continue
        assert any(clipped), kind
        for step in run.metrics:
            shrinks = step.get("train/clip_factor", 1.0) < 1.0 or step.get("train/clipped_fraction", 0.0) > 0.0
            assert step["train/clipped"] == float(shrinks)
    assert [run.scalars["updates"] for run in (runs["global"], runs["spam"], runs["stable_spam"])] == [5, 3, 3]
    rates = [step["train/lr"] for step in runs["spam"].metrics]
    plain = [step["train/lr"] for step in runs["none"].metrics]
    assert [rate == expected for rate, expected in zip(rates, plain, strict=True)] == [True, True, False, False, True]
    # What is measured is the gradient before any clipping: in the first step that is one and the same.
    assert len({run.metrics[0]["train/grad_norm"] for run in runs.values()}) == 1


@by_division
def test_two_ranks_clip_as_one_process_does(division: str) -> None:
    alone = one_process()
    assert_same_training(runs_of(OF_THIS_FILE, division), {kind: alone[kind] for kind in OF_THIS_FILE}, {})


@pytest.mark.parametrize(("world", "division"), [(1, "replicas"), (2, "ep2-sharded")])
def test_a_saved_state_continues_bit_for_bit(world: int, division: str) -> None:
    for broken in run_distributed(resumed, world, REMEMBERING, DIVISIONS[division], AROUND_A_RESET, timeout_s=240):
        assert broken == []


@pytest.mark.parametrize(("world", "division"), [(1, "replicas"), (2, "ep2")])
def test_a_step_that_is_refused_leaves_no_trace(world: int, division: str) -> None:
    for broken in run_distributed(refused, world, OF_THIS_FILE, DIVISIONS[division], timeout_s=120):
        assert broken == []


IDLE = 7


def starve(trainer: Trainer) -> None:
    for router in trainer.routers:
        router.expert_bias_E[IDLE] = -100.0


def averages_of_an_idle_expert(rank: int, world: int, parallel: dict[str, Any]) -> Any:
    """AdaGC's averages of expert 7 and of all units before and after three steps without a token for it."""
    clip = {"kind": "adagc", "warmup_steps": 1, "relative_limit": 1.01}
    changes: dict[str, Any] = {"stability": {"balance": {"kind": "none"}, "clip": clip}}
    trainer = tiny_trainer(tiny_config(changes, {"parallel": {"workers": world, **parallel}}))
    names: list[tuple[str, int]] = []
    experts = trainer.config.model.moe.num_experts
    for name, _ in trainer.model.named_parameters():
        names += [(name, e) for e in range(experts)] if ".experts." in name else [(name, 0)]
    states = []
    for step in range(5):
        if step == 2:
            starve(trainer)
        trainer.step()
        if step in (1, 4):
            states.append(saved(trainer)[0]["stability.clip.average"])
    idle = [i for i, (name, e) in enumerate(names) if ".experts." in name and e == IDLE]
    assert len(names) == len(Units(trainer.parameters.all, trainer.ranks)) == len(states[0])
    return states, idle


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"expert_parallel": 2})])
def test_an_expert_without_tokens_keeps_its_average(world: int, parallel: dict[str, Any]) -> None:
    assert AdaGcClipConfig().decay < 1
    for (before, after), idle in run_distributed(averages_of_an_idle_expert, world, parallel):
        assert len(idle) == 4
        assert before[idle].all()
        unchanged = (before == after).nonzero().flatten().tolist()
        assert unchanged == idle
