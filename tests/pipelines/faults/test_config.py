"""Faults in a config: what is refused, and in which words."""

from typing import get_args

import pytest

from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.fault_config import BitFlipConfig, FaultConfig
from pipelines.faults.batches import corrupted_steps
from pipelines.faults.hooks import HOOKS
from tests.pipelines.small_run import small_config

# Micro has two layers, of which the second has experts: 8, of which a token chooses 2. 12 steps, checkpoints every 4.
PAIR = ("parallel.workers=2", "parallel.expert_parallel=2")


def problem(fault: str, *settings: str) -> str:
    with pytest.raises(UserError) as caught:
        small_config(f"faults=[{fault}]", *settings)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("{kind: nan_gradient, step: 13}", "faults.0.step (13) is after the last of the schedule's 12 optimizer steps"),
        ("{kind: nan_gradient, step: 0}", "faults.0.step: should be greater than 0, got 0 (set by --set)"),
        ("{kind: nan_gradient}", "faults.0.step: is required here"),
        (
            "{kind: corrupted_batch, step: 13}",
            "faults.0.step (13) is after the last of the schedule's 12 optimizer steps",
        ),
        (
            "{kind: corrupted_batch, step: 1, ngram_tokens: 33}",
            "faults.0.ngram_tokens (33) does not fit twice into a sequence of 64 tokens",
        ),
        (
            "{kind: lr_jump, step: 10, factor: 2, steps: 4}",
            "faults.0.steps (4) from step 10 on reach beyond the schedule's 12 optimizer steps",
        ),
        ("{kind: lr_jump, step: 1, factor: 1}", "faults.0.factor: is 1, which changes nothing"),
        ("{kind: weight_scaled, step: 1, factor: 2}", "faults.0: parameters or group is required here: what is scaled"),
        ("{kind: weight_scaled, step: 1, factor: 1, group: dense}", "faults.0: factor is 1, which changes nothing"),
        (
            "{kind: nan_gradient, step: 1, parameters: '*', group: dense}",
            "faults.0: parameters and group both say what is hit; leave one of them out",
        ),
        (
            "{kind: nan_gradient, step: 1, rank: 1}",
            "faults.0.rank (1) is none of parallel.workers (1), which are counted from 0",
        ),
        (
            "{kind: bit_flip, step: 1, bit: mantissa}",
            "faults.0.bit: should be low_mantissa, exponent, sign or the number of a bit, got 'mantissa'",
        ),
        (
            "{kind: bit_flip, step: 1, bit: 32}",
            "faults.0.bit: should be less than or equal to 31, got 32 (set by --set)",
        ),
        ("{kind: activation_outlier, step: 1, layer: 0}", "faults.0.layer (0) has no experts; the first that has is 1"),
        ("{kind: activation_outlier, step: 1, layer: 2}", "faults.0.layer (2) has no experts; the first that has is 1"),
        (
            "{kind: activation_outlier, step: 1, expert: 8}",
            "faults.0.expert (8) is none of model.moe.num_experts (8), counted from 0",
        ),
        (
            "{kind: router_collapse, step: 1, experts: 8}",
            "faults.0.experts (8) should be at least the 2 that a token may choose, and fewer than "
            "model.moe.num_experts (8)",
        ),
        (
            "{kind: stalled_worker, step: 1, seconds: 400}",
            "faults.0.kind is stalled_worker, but parallel.workers is 1: no other waits for it, so nobody notices",
        ),
        (
            "{kind: full_disk, step: 5, steps: 3}",
            "faults.0.steps (3) from step 5 to 7 have no checkpoint (checkpoint.every_steps)",
        ),
        (
            "{kind: corrupt_checkpoint, step: 4}",
            "faults.0.step (4) has no checkpoint before it (checkpoint.every_steps is 4)",
        ),
        (
            "{kind: dead_tracking_server, step: 4, seconds: 2}",
            "faults.0.seconds: should be greater than or equal to 5, got 2 (set by --set)",
        ),
    ],
)
def test_a_fault_that_could_do_nothing_is_one_line(fault: str, line: str) -> None:
    assert problem(fault).removesuffix(" (set by --set)") == line.removesuffix(" (set by --set)")


@pytest.mark.parametrize(
    ("fault", "settings", "line"),
    [
        (
            "{kind: stalled_worker, step: 1, seconds: 20}",
            ("recovery.stall_timeout_s=20", *PAIR),
            "faults.0.seconds (20) is not above recovery.stall_timeout_s (20), so nobody would notice; make either fit",
        ),
        (
            "{kind: router_collapse, step: 1, layer: 1}",
            ("model.moe.hash_layers=1", "model.num_layers=3"),
            "faults.0.layer (1) is hash-routed (model.moe.hash_layers), so its router's weights choose nothing",
        ),
        (
            "{kind: nan_gradient, step: 1, group: experts}",
            ("model.moe={num_experts: 0}", "stability.balance.kind=none"),
            "faults.0.group (experts) is of nothing, since model.moe.num_experts is 0",
        ),
        (
            "{kind: activation_outlier, step: 1}",
            ("model.moe={num_experts: 0}", "stability.balance.kind=none"),
            "faults.0.kind is activation_outlier, but no layer of model has experts",
        ),
        (
            "{kind: corrupt_checkpoint, step: 9}",
            ("checkpoint.every_steps=0",),
            "faults.0.step (9) has no checkpoint before it (checkpoint.every_steps is 0)",
        ),
    ],
)
def test_so_is_one_that_the_rest_of_the_config_leaves_nothing_to_do(
    fault: str, settings: tuple[str, ...], line: str
) -> None:
    assert problem(fault, *settings) == line


@pytest.mark.parametrize(("bit", "number"), [("sign", 31), ("exponent", 30), ("low_mantissa", 0), (7, 7)])
def test_a_bit_has_a_name_or_a_number(bit: str | int, number: int) -> None:
    assert BitFlipConfig.model_validate({"step": 1, "bit": bit}).bit == number


def test_every_fault_has_what_makes_it_happen() -> None:
    classes = set(get_args(get_args(FaultConfig)[0]))
    assert classes - set(HOOKS) == {c for c in classes if "Corrupted" in c.__name__}
    assert len(classes) == 13


def test_the_steps_with_bad_text_are_those_of_both_kinds() -> None:
    faults = "faults=[{kind: corrupted_batch, step: 7}, {kind: corrupted_batches, share: 1, from_step: 11}]"
    assert corrupted_steps(small_config(faults, "schedule.steps=12")) == {7, 11, 12}
    assert corrupted_steps(small_config("faults=[{kind: lr_jump, step: 7, factor: 2}]")) == frozenset()


def test_faults_survive_being_written_down() -> None:
    fault = "faults=[{kind: bit_flip, step: 3, bit: sign, target: gradient}, {kind: full_disk, step: 3, steps: 2}]"
    config = small_config(fault)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
