"""Training with FP8 products: where they are, what is reported, and that divisions, runs and resumes agree."""

import functools
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from moe.fp8.products import Fp8Products
from moe.layers.linear import Linear
from moe.trainer import Trainer
from tests.distributed import run_distributed
from tests.moe.divisions import resumed
from tests.moe.test_expert_parallel import (
    FP32,
    MODELS,
    PADDED,
    STEPS,
    Run,
    Tolerance,
    assert_norms_are_those_of_the_whole_gradients,
    assert_same_training,
    train,
)
from tests.moe.tiny import (
    MTP,
    assert_bit_identical,
    global_batch,
    same_bits,
    saved,
    tiny_config,
    tiny_trainer,
    trained,
)


def fp8(compute: str = "fp32", **options: Any) -> dict[str, Any]:
    return {"precision": {"compute": compute, "fp8": {"kind": "deepseek_v3", **options}}}


# ---- where -----------------------------------------------------------------------------------------------------------


def test_every_matrix_but_head_router_and_embedding_multiplies_in_fp8() -> None:
    for attention in ({"kind": "mla"}, {"kind": "mha", "num_heads": 2, "head_dim": 8}):
        model = tiny_trainer(tiny_config(MTP, {"model": {"attention": attention}}, fp8())).model
        linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
        assert {name for name, linear in linears.items() if not isinstance(linear.products, Fp8Products)} == {"head"}
        assert len(linears) > 15
        for layer in model.moe_layers():
            assert isinstance(layer.experts.up_products, Fp8Products)
            assert isinstance(layer.experts.down_products, Fp8Products)


@pytest.mark.parametrize("part", ["attention.q_proj", "gate_up", ".down.", "experts.w_up", "experts.w_down", "project"])
def test_changes_below_the_grid_of_a_weight_change_nothing(part: str) -> None:
    """A weight moved by less than half a step of its block's grid is the same number in FP8."""

    def nudge(trainer: Trainer, shift: float) -> None:
        found = [p for name, p in trainer.model.named_parameters() if part in name and p.dim() > 1]
        assert found
        with torch.no_grad():
            for p in found:
                # Onto the grid first, so that nothing is near a tie. The largest is 1, where no scale changes.
                codes = (p / p.abs().max()).to(torch.bfloat16).view(torch.int16) & ~0xF
                p.copy_(codes.view(torch.bfloat16).float() * (1 + shift))

    losses = []
    for shift in (0.0, 2.0**-9):
        [metrics], _ = trained([fp8(scales="power_of_two")], functools.partial(nudge, shift=shift), steps=1)
        losses.append(metrics["train/loss"])
    assert losses[0] == losses[1]


def test_without_it_nothing_is_reported() -> None:
    [metrics], _ = trained([], steps=1)
    assert not any(name.startswith("fp8/") for name in metrics)


def test_losses_stay_near_those_of_fp32() -> None:
    plain, _ = trained([], steps=12)
    for changes in (fp8(), fp8(dispatch=True, scales="power_of_two")):
        rounded, _ = trained([changes], steps=12)
        assert rounded[-1]["train/loss"] == pytest.approx(plain[-1]["train/loss"], rel=5e-3)
        assert rounded[-1]["train/loss"] != plain[-1]["train/loss"]


@pytest.mark.parametrize(
    "options",
    [
        {"scaling": "tensor"},
        {"gradients": "e5m2"},
        {"scales": "power_of_two"},
        {"accumulation": "promoted"},
        {"accumulation": "unpromoted"},
        {"dispatch": True},
    ],
)
def test_every_option_makes_another_run(options: dict[str, Any]) -> None:
    plain, _ = trained([fp8()], steps=2)
    other, _ = trained([fp8(**options)], steps=2)
    assert other[1]["train/loss"] != plain[1]["train/loss"]
    assert other[1]["train/loss"] == pytest.approx(plain[1]["train/loss"], rel=1e-2)


# ---- what is reported ------------------------------------------------------------------------------------------------


def counted(rank: int, world: int, parallel: dict[str, Any]) -> list[tuple[list[float], int]]:
    """Sums of this rank after a step, and elements of the whole model's weights in FP8: without and with dispatch."""
    found = []
    for dispatch in (False, True):
        config = tiny_config(MTP, {"parallel": {"workers": world, **parallel}}, fp8(dispatch=dispatch))
        trainer = tiny_trainer(config, (0,))
        weights = sum(
            p.numel() * (config.parallel.expert_parallel if ".experts." in name else 1)
            for name, p in trainer.model.named_parameters()
            if p.dim() > 1 and not name.startswith(("embed", "head")) and "router" not in name
        )
        trainer.step()
        assert trainer.fp8_tally is not None
        found.append((trainer.fp8_tally.sums.tolist(), weights))
    return found


def test_values_count_once_however_ranks_are_divided() -> None:
    alone = counted(0, 1, {})
    assert all(sums[3] == weights for sums, weights in alone)
    for parallel in ({}, {"expert_parallel": 2, "dense": "shard"}):
        for (want, _), *ranks in zip(alone, *run_distributed(counted, 2, parallel), strict=True):
            summed = [sum(column) for column in zip(*(sums for sums, _ in ranks), strict=True)]
            # Values of activations, weights and gradients.
            assert summed[0::3] == want[0::3]


def test_shares_are_those_of_what_was_rounded() -> None:
    [metrics], _ = trained([fp8()], steps=1)
    for operand in ("activations", "weights", "gradients"):
        # A tile of this model has 5 to 48 values, one of which is the largest.
        assert 0 < metrics[f"fp8/underflow_share_{operand}"] < 0.05
        assert 1e-3 < metrics[f"fp8/saturated_share_{operand}"] < 0.25
    assert len([name for name in metrics if name.startswith("fp8/")]) == 6


# ---- divisions, runs, resumes ----------------------------------------------------------------------------------------

# A value on the other side of a tie is another number of FP8, 6 % away; from the second step on, a last bit of fp32
# decides which. So weights stand still here, and power-of-two scales round alike in whatever tile a value lies (but
# for what underflows): then all divisions agree as in fp32. bf16 rounds sums of several ranks on its own: measured
# 8e-3 and 1.1e-1.
STILL = {"optimizer": {"lr": 1e-9}}
BF16 = Tolerance(figures=3e-2, gradients=3e-1, weights=1e-5)


def changes_for(world: int, parallel: dict[str, Any], micro: int | None, compute: str) -> list[dict[str, Any]]:
    rounding = fp8(compute, scales="power_of_two", dispatch=True)
    return [
        MODELS["v3-forced"],
        {"parallel": {"workers": world, **parallel}, "data": {"micro_batch_size": micro}},
        STILL,
        rounding,
    ]


@functools.cache
def reference(compute: str) -> Run:
    [run] = run_distributed(train, 1, changes_for(1, {}, None, compute), True)
    assert isinstance(run, Run)
    return run


def without_shares(run: Run) -> Run:
    for step in run.steps:
        step.metrics = {name: value for name, value in step.metrics.items() if not name.startswith("fp8/")}
    return run


def assert_dispatch_takes_a_byte_a_value(runs: list[Run], compute: str) -> None:
    """One way of four; with one byte for each tile of 128."""
    config = tiny_config(MODELS["v3-forced"])
    width, element = config.model.hidden_size, {"fp32": 4, "bf16": 2}[compute]
    for number in range(STEPS):
        batch = global_batch(config, number, padded=number in PADDED)
        length = config.data.sequence_length
        real = torch.ones_like(batch.ids_BL, dtype=torch.bool) if batch.real_BL is None else batch.real_BL
        tokens = int((real[:, :length] & real[:, 1 : length + 1]).sum())
        pairs = sum(run.steps[number].remote_pairs for run in runs)
        bytes_sent = pairs * (width + math.ceil(width / 128) + 3 * width * element)
        assert runs[0].steps[number].metrics["train/ep_bytes_per_token"] * tokens == pytest.approx(bytes_sent)


@pytest.mark.parametrize(
    ("parallel", "micro"),
    [
        pytest.param({"expert_parallel": 2, "dense": "shard"}, 2, id="ep2-sharded"),
        pytest.param({"expert_parallel": 2}, None, id="ep2", marks=pytest.mark.slow),
        pytest.param({}, 1, id="replicas", marks=pytest.mark.slow),
    ],
)
def test_ranks_train_what_one_process_trains(parallel: dict[str, Any], micro: int | None) -> None:
    runs = run_distributed(train, 2, changes_for(2, parallel, micro, "fp32"), True)
    assert_same_training(runs, reference("fp32"), FP32)
    assert_norms_are_those_of_the_whole_gradients(runs[0])
    if parallel:
        assert_dispatch_takes_a_byte_a_value(runs, "fp32")


@pytest.mark.slow
def test_bf16_ranks_agree_to_its_rounding() -> None:
    runs = run_distributed(train, 2, changes_for(2, {"expert_parallel": 2}, 2, "bf16"), True)
    assert_same_training([without_shares(run) for run in runs], without_shares(reference("bf16")), BF16)
    assert_dispatch_takes_a_byte_a_value(runs, "bf16")


CASES = {
    "dispatch": [fp8("bf16", dispatch=True)],
    "controls": [fp8(scaling="tensor", gradients="e5m2")],
}


def test_runs_continue_bit_for_bit() -> None:
    parallel = {"expert_parallel": 2, "dense": "shard"}
    for broken in run_distributed(resumed, 2, CASES, parallel, (3,), timeout_s=240):
        assert broken == []


def test_two_runs_have_the_same_bits() -> None:
    for changes in CASES.values():
        assert_bit_identical(trained(changes), trained(changes))


# ---- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dispatch": True}, {"scales": "power_of_two"}, {"scaling": "tensor"}])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("where", ["input of experts", "gradient of experts"])
def test_a_step_that_is_not_finite_is_refused(where: str, bad: float, options: dict[str, Any]) -> None:
    trainer = tiny_trainer(tiny_config(MTP, fp8(**options)))
    trainer.step()
    before, _ = saved(trainer)

    def spoil(x: torch.Tensor) -> torch.Tensor:
        spoilt = x.clone()
        spoilt.view(-1)[37] = bad
        return spoilt

    def spoil_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return spoil(args[0]), *args[1:]

    def spoil_gradient(module: Any, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(spoil)

    experts = trainer.model.moe_layers()[0].experts
    if where == "input of experts":
        handle = experts.register_forward_pre_hook(spoil_input)
    else:
        handle = experts.register_forward_hook(spoil_gradient)
    assert not trainer.step().taken
    after, _ = saved(trainer)
    assert all(same_bits(before[name], after[name]) for name in before)
    handle.remove()
    assert trainer.step().taken


# ---- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (fp8(dispatch=True, scaling="tensor"), "dispatch sends a scale for each tile, but scaling is tensor"),
        (
            {**fp8(dispatch=True), "model": {"moe": {"num_experts": 0}}, "stability": {"balance": {"kind": "none"}}},
            r"precision\.fp8\.dispatch has no effect, since model\.moe\.num_experts is 0",
        ),
        (fp8(kernel="native"), "kernel"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_config({"stability": {"balance_loss": {"kind": "none"}}}, changes)
