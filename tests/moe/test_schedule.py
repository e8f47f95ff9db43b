"""The schedule against its formulas, written for one step at a time."""

import math
from typing import Any

import pytest

from moe.config.schedule import CosineDecay, SimpleSchedule, WsdDecay
from moe.config.trainer import TrainerConfig
from moe.schedule import Timeline
from tests.moe.tiny import tiny_config

PEAK = 2e-3


def config(schedule: dict[str, Any], **more: Any) -> TrainerConfig:
    return tiny_config({"optimizer": {"lr": PEAK}, "schedule": {"kind": "stages"} | schedule, **more})


def rates(schedule: dict[str, Any], steps: int) -> list[float]:
    timeline = Timeline(config(schedule))
    return [timeline.at(step).lr / PEAK for step in range(steps)]


@pytest.mark.parametrize("warmup", [0, 1, 5, 12])
def test_warm_up_then_half_a_cosine(warmup: int) -> None:
    schedule = SimpleSchedule(steps=12, warmup_steps=warmup, decay=CosineDecay(final_fraction=0.2))
    got = rates(schedule.model_dump(), 20)
    for step, rate in enumerate(got):
        done = step + 1
        if done <= warmup:
            expected = done / warmup
        elif done >= 12:
            expected = 1.0 if warmup == 12 else 0.2
        else:
            expected = 0.2 + 0.8 * (math.cos(math.pi * (done - warmup) / (12 - warmup)) + 1) / 2
        assert rate == pytest.approx(expected), step
    assert max(got) <= 1.0


def test_constant_stays_at_the_peak_after_the_warm_up() -> None:
    got = rates({"kind": "simple", "steps": 10, "warmup_steps": 4, "decay": {"kind": "constant"}}, 7)
    assert got == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("linear", lambda p: 1 - p),
        ("cosine", lambda p: (1 + math.cos(math.pi * p)) / 2),
        ("one_minus_sqrt", lambda p: 1 - math.sqrt(p)),
    ],
)
def test_wsd_holds_the_peak_and_decays_over_its_last_steps(shape: Any, left: Any) -> None:
    schedule = SimpleSchedule(steps=12, warmup_steps=2, decay=WsdDecay(decay_steps=4, shape=shape, final_fraction=0.1))
    expected = [0.5] + [1.0] * 7 + [0.1 + 0.9 * left(done / 4) for done in (1, 2, 3, 4)]
    assert rates(schedule.model_dump(), 12) == pytest.approx(expected)


def test_without_stable_steps_wsd_is_warm_up_and_decay() -> None:
    schedule = SimpleSchedule(steps=4, warmup_steps=2, decay=WsdDecay(decay_steps=2, shape="linear"))
    assert rates(schedule.model_dump(), 4) == pytest.approx([0.5, 1.0, 0.5, 0.0])


STAGES = {
    "stages": [
        {"steps": 3, "lr": {"kind": "linear", "start": 0.1, "end": 1.0}, "global_batch_size": 4, "sequence_length": 8},
        # 8 sequences of 16 tokens: 300 tokens are two batches and a part.
        {"tokens": 300, "bias_update_rate": 5e-3, "balance_coefficient": 0.5, "clip_max_norm": 0.25},
        {"steps": 2, "lr": {"kind": "cosine", "start": 1.0, "end": 0.2}, "bias_update_rate": 0.0},
    ]
}


def test_stages_follow_each_other_in_steps_or_tokens() -> None:
    chosen = config(STAGES)
    timeline = Timeline(chosen)
    assert (chosen.steps, timeline.steps) == (8, 8)
    moments = [timeline.at(step) for step in range(9)]
    assert [moment.stage for moment in moments] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [(m.global_batch_size, m.sequence_length) for m in moments] == [(4, 8)] * 3 + [(8, 16)] * 6
    assert [m.lr / PEAK for m in moments] == pytest.approx([0.4, 0.7, 1, 1, 1, 1, 0.6, 0.2, 0.2])
    assert [m.bias_update_rate for m in moments] == [None] * 3 + [5e-3] * 3 + [0.0] * 3
    assert [m.balance_coefficient for m in moments] == [None] * 3 + [0.5] * 3 + [None] * 3
    assert [m.clip_max_norm for m in moments] == [None] * 3 + [0.25] * 3 + [None] * 3
    assert [timeline.tokens_before(step) for step in range(9)] == [0, 32, 64, 96, 224, 352, 480, 608, 736]


def test_the_shorthand_is_its_stages_bit_for_bit() -> None:
    simple = SimpleSchedule(steps=50, warmup_steps=7, decay=WsdDecay(decay_steps=9))
    stages = [stage.model_dump() for stage in simple.as_stages()]
    assert rates(simple.model_dump(), 60) == rates({"stages": stages}, 60)


@pytest.mark.parametrize(
    ("stage", "changes", "complaint"),
    [
        ({}, {}, "either steps or tokens"),
        ({"steps": 1, "tokens": 1}, {}, "either steps or tokens"),
        ({"steps": 1, "sequence_length": 5}, {}, "does not divide data.sequence_length"),
        ({"steps": 1, "sequence_length": 4, "global_batch_size": 6}, {}, "a multiple of 4"),
        ({"steps": 1, "global_batch_size": 7}, {"parallel": {"workers": 2}}, "is not divisible by parallel.workers"),
        ({"steps": 1, "global_batch_size": 6}, {"data": {"micro_batch_size": 4}}, "does not divide a worker's share"),
        (
            {"steps": 1, "clip_max_norm": 1.0},
            {"stability": {"clip": {"kind": "none"}}},
            r"schedule.stages.0.clip_max_norm has nothing to act on: stability.clip.kind is none",
        ),
        (
            {"steps": 1, "bias_update_rate": 0.0},
            {"stability": {"balance": {"kind": "none"}}},
            r"schedule.stages.0.bias_update_rate has nothing to act on",
        ),
    ],
)
def test_a_stage_that_cannot_be_is_refused_by_name(
    stage: dict[str, Any], changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        config({"stages": [stage]}, **changes)


def test_a_shorthand_whose_parts_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"are more than steps \(10\)"):
        SimpleSchedule(steps=10, warmup_steps=5, decay=WsdDecay(decay_steps=6))
