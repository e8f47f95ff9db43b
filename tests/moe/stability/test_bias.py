"""The schedule of bias updates as a pure function of the step, and balances that a config refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe.config.balance import BiasScheduleConfig
from moe.config.trainer import TrainerConfig
from moe.stability.bias import move_bias, update_factor
from tests.moe.stability.moments import START
from tests.moe.tiny import tiny_config

STEPS = 20


def factors(**schedule: int) -> list[float]:
    config = BiasScheduleConfig(**schedule)
    return [update_factor(config, replace(START, step=step, steps=STEPS)) for step in range(STEPS)]


def test_updates_are_whole_unless_a_schedule_says_otherwise() -> None:
    assert factors() == [1.0] * STEPS


def test_updates_rise_hold_fall_and_rest() -> None:
    expected = [0.25, 0.5, 0.75, 1.0] + [1.0] * 8 + [0.8, 0.6, 0.4, 0.2, 0.0] + [0.0] * 3
    assert factors(warmup_steps=4, decay_steps=5, frozen_steps=3) == pytest.approx(expected)


def test_a_frozen_end_is_a_rate_of_zero_as_in_deepseek_v3() -> None:
    assert factors(frozen_steps=2) == [1.0] * 18 + [0.0] * 2
    assert factors(frozen_steps=STEPS) == [0.0] * STEPS


def test_a_decay_ends_at_zero_at_the_last_step() -> None:
    assert factors(decay_steps=4)[-5:] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert factors(warmup_steps=10, decay_steps=10)[9:12] == pytest.approx([1.0, 0.9, 0.8])


def test_a_factor_of_zero_leaves_every_bit() -> None:
    bias_E = torch.tensor([0.1, 0.2, -0.25])  # whose mean is not 0: recentring alone would move it
    before = bias_E.clone()
    move_bias(bias_E, torch.ones(3), 0.0)
    assert torch.equal(bias_E, before)


def refused(stability: dict[str, Any], *changes: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        tiny_config({"stability": {"balance": stability}}, *changes)
    return str(caught.value)


DENSE: dict[str, Any] = {"model": {"moe": {"num_experts": 0}}}
GROUPED: dict[str, Any] = {"model": {"moe": {"num_groups": 4, "top_groups": 2}}}


@pytest.mark.parametrize("kind", ["sign", "proportional", "smebu", "quantile"])
def test_a_schedule_longer_than_training_is_refused(kind: str) -> None:
    schedule = {"warmup_steps": 5, "decay_steps": 10, "frozen_steps": 6}
    message = refused({"kind": kind, "schedule": schedule})
    assert "warmup_steps + decay_steps + frozen_steps (21) are more than all steps (20)" in message
    tiny_config({"stability": {"balance": {"kind": kind, "schedule": schedule | {"frozen_steps": 5}}}})


@pytest.mark.parametrize("kind", ["proportional", "smebu", "quantile"])
def test_a_dense_model_has_no_bias_to_move(kind: str) -> None:
    assert f"stability.balance.kind is {kind}, but model.moe.num_experts is 0" in refused({"kind": kind}, DENSE)
    assert isinstance(tiny_config({"stability": {"balance": {"kind": "sign"}}}, DENSE), TrainerConfig)


def test_a_dense_model_has_no_load_for_a_batch_loss() -> None:
    with pytest.raises(ValueError, match=r"balance_loss\.kind is batch, but model\.moe\.num_experts is 0"):
        tiny_config({"stability": {"balance_loss": {"kind": "batch"}}}, DENSE)


def test_quantiles_are_refused_where_they_are_not_defined() -> None:
    message = refused({"kind": "quantile"}, GROUPED)
    assert "not defined for group-limited selection: set model.moe.top_groups to model.moe.num_groups (4)" in message
    assert "model.moe.top_k is model.moe.num_experts (8)" in refused(
        {"kind": "quantile"}, {"model": {"moe": {"top_k": 8}}}
    )
    all_groups = {"model": {"moe": {"num_groups": 4, "top_groups": 4}}}
    tiny_config({"stability": {"balance": {"kind": "quantile"}}}, all_groups)
