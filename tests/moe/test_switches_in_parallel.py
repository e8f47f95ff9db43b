"""Norms, activations and starting weights: any division of the ranks trains the same model with each switch."""

import functools
import math
from dataclasses import replace
from typing import Any

import pytest

from moe.config.model import ModelConfig
from moe.model import Transformer
from tests.distributed import run_distributed
from tests.moe.build import ALONE
from tests.moe.test_expert_parallel import (
    FP32,
    Run,
    Tolerance,
    assert_norms_are_those_of_the_whole_gradients,
    assert_same_training,
    train,
)
from tests.moe.tiny import tiny_config

# Measured over all switches: 1.3e-2, 1.2e-1 and 4.1e-3, no more than one process differs from fp32 (1.9e-2, 1.6e-1 and
# 5.4e-3). Norms on small outputs and heads raise what the rounding of those outputs leaves.
BF16 = Tolerance(figures=2e-2, gradients=2e-1, weights=8e-3)

# With all norms at once some gradients are small differences of large terms: one process in two micro-batches differs
# from itself by 1.2e-5 already, replicas without expert parallelism by 4.1e-5, two expert parallel ranks by 3.9e-5.
CANCELLED = replace(FP32, gradients=1e-4)

# The few numbers that scale what is read off the streams sum up gradients that mostly cancel: in fp32 one process in
# micro-batches differs from itself by 2.2e-5, sharded ranks by 1.9e-5 (all else by 2e-6); in bf16 nothing is left of
# some (2.7 and 1.3), while weights differ by 1.8e-3 at most.
STREAMS = {"fp32": CANCELLED, "bf16": replace(BF16, gradients=math.inf)}

MHA = {"kind": "mha", "num_heads": 2, "head_dim": 8}

# Limits low enough that they act on a model this small.
SWITCHES: dict[str, dict[str, Any]] = {
    "sandwich": {"norm_placement": "sandwich"},
    "reordered": {"norm_placement": "reordered"},
    "normed heads": {"attention": {"qk_norm": True}},
    "normed heads, plain attention": {"attention": {**MHA, "qk_norm": True}},
    "scaled latents": {"attention": {"scale_latents": True}},
    "normed experts": {"moe": {"output_norm": True}},
    "clamped": {"activation": {"kind": "swiglu_clamp", "limit": 0.3}},
    "smoothly bounded": {"activation": {"kind": "situ_glu", "gate_bound": 0.5, "up_bound": 0.8}},
    # With an alpha of 0.01 the streams stay nearly equal, and many gradients are what their small differences give.
    # Without a constraint one process in micro-batches differs from itself by 8e-2 after four steps with an alpha of 1.
    "unconstrained streams": {"residual": {"kind": "hyper", "alpha": 0.1}},
    "constrained streams": {"residual": {"kind": "mhc", "alpha": 1.0}},
    "small outputs, large embeddings": {"init": {"output_scale": "depth", "embedding_std": 1.0}},
    "all at once": {
        "norm_placement": "sandwich",
        "attention": {"qk_norm": True},
        "moe": {"output_norm": True},
        "activation": {"kind": "swiglu_clamp", "limit": 0.3},
    },
    "several": {
        "norm_placement": "reordered",
        "attention": {"scale_latents": True},
        "moe": {"output_norm": True},
        "activation": {"kind": "swiglu_clamp", "limit": 0.3},
    },
}


TOGETHER = ("all at once", "several")
# What bf16 rounds in them is rounded in another switch, too.
OF_SAME_PARTS = (
    "reordered",
    "normed heads, plain attention",
    "unconstrained streams",
    "small outputs, large embeddings",
)


def changes_for(switch: str, world: int, parallel: dict[str, Any], micro: int | None, compute: str) -> list[Any]:
    # Forced routing leaves the balance loss's own choice free, which bf16 may turn.
    loss = {"stability": {"balance_loss": {"kind": "none"}}} if compute == "bf16" else {}
    run = {"data": {"micro_batch_size": micro}, "precision": {"compute": compute}}
    groups = {"model": {"mtp": {"depth": 1}, "moe": {"num_groups": 4, "top_groups": 2, "top_k": 3}}}
    return [groups, {"model": SWITCHES[switch]}, {"parallel": {"workers": world, **parallel}}, run, loss]


@functools.cache
def reference(switch: str, compute: str) -> Run:
    """One process, the whole batch at once."""
    [run] = run_distributed(train, 1, changes_for(switch, 1, {}, None, compute), compute == "bf16")
    assert isinstance(run, Run)
    return run


def check(switch: str, parallel: dict[str, Any], compute: str = "fp32", tolerance: Tolerance = FP32) -> None:
    """Two ranks in micro-batches against one process; two of the steps have padding."""
    changes = changes_for(switch, 2, parallel, 2 if compute == "bf16" else 1, compute)
    runs = run_distributed(train, 2, changes, compute == "bf16", timeout_s=120)
    assert_same_training(runs, reference(switch, compute), tolerance)
    assert_norms_are_those_of_the_whole_gradients(runs[0])


PARALLEL: dict[str, dict[str, Any]] = {
    "replicas": {},
    "ep2": {"expert_parallel": 2},
    "ep2-sharded": {"expert_parallel": 2, "dense": "shard"},
}


def test_every_switch_makes_another_model() -> None:
    plain = tiny_config().model
    for switch, changes in SWITCHES.items():
        config: ModelConfig = tiny_config({"model": changes}).model
        assert config != plain, switch
        Transformer(config, ALONE)


@pytest.mark.parametrize("parallel", ["replicas", "ep2-sharded"])
def test_ranks_train_what_one_process_trains_with_several_switches(parallel: str) -> None:
    check("several", PARALLEL[parallel])


def test_sharded_expert_parallel_ranks_train_what_one_process_trains_with_all_switches() -> None:
    check("all at once", PARALLEL["ep2-sharded"], tolerance=CANCELLED)


def test_sharded_expert_parallel_ranks_train_what_one_process_trains_with_constrained_streams() -> None:
    check("constrained streams", PARALLEL["ep2-sharded"], tolerance=STREAMS["fp32"])


def test_bf16_ranks_agree_to_its_rounding_with_a_clamp() -> None:
    check("clamped", PARALLEL["ep2"], "bf16", BF16)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicas", "ep2"])
def test_ranks_train_what_one_process_trains_with_all_switches(parallel: str) -> None:
    check("all at once", PARALLEL[parallel], tolerance=CANCELLED)


@pytest.mark.slow
@pytest.mark.parametrize("switch", [name for name in SWITCHES if name not in (*TOGETHER, "constrained streams")])
def test_sharded_expert_parallel_ranks_train_what_one_process_trains_with_each_switch(switch: str) -> None:
    check(switch, PARALLEL["ep2-sharded"], tolerance=STREAMS["fp32"] if "streams" in switch else FP32)


@pytest.mark.slow
@pytest.mark.parametrize("switch", [name for name in SWITCHES if name not in (*TOGETHER, *OF_SAME_PARTS, "clamped")])
def test_bf16_ranks_agree_to_its_rounding_with_each_switch(switch: str) -> None:
    check(switch, PARALLEL["ep2"], "bf16", STREAMS["bf16"] if "streams" in switch else BF16)
