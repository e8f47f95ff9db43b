import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe.config.trainer import TrainerConfig
from pipelines.config import RunConfig
from tuning.measure_names import MEASURES, OF_CLIP, OF_EVENTS, OF_EXPERTS, OF_TOKENS
from tuning.measures import measure, warmup_steps
from tuning.series import Series

STEPS = 200
# One layer's MaxVio when 1024 tokens take 2 of 8 experts at random, by simulation.
FLOOR = 0.0826


def config(**keys: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"moe": {"num_experts": 8, "top_k": 2}},
            "schedule": {"kind": "simple", "steps": STEPS, "warmup_steps": 20},
            "data": {"global_batch_size": 16, "sequence_length": 64},
        }
        | keys
    )


def falling() -> list[float]:
    return [5.5 - 3.5 * step / (STEPS - 1) for step in range(STEPS)]


def series(
    loss: Sequence[float] | None = None,
    max_vio: Sequence[float] | None = None,
    outcome: str = "finished",
    validation: dict[str, float] | None = None,
    **others: Sequence[float],
) -> Series:
    loss = falling() if loss is None else loss
    done = len(loss)
    train = {
        "train/loss": loss,
        "train/grad_norm": others.get("grad_norm", [1.0] * done),
        "train/step_seconds": [0.25] * done,
        "train/clipped": others.get("clipped", [0.0] * done),
        "moe/max_vio_batch": [0.5] * done if max_vio is None else max_vio,
    }
    end = {"val/loss": 2.1, "moe/max_vio_global": 0.25, "moe/dead_experts": 1.0}
    return Series(outcome, STEPS, train, end if validation is None else validation)


def test_a_run_with_everything_has_every_measure() -> None:
    measures = measure(series(), config())
    assert set(measures) == set(MEASURES) - OF_EVENTS - OF_TOKENS
    assert all(math.isfinite(value) for value in measures.values())


def test_the_end_of_a_run_that_finished() -> None:
    measures = measure(series(), config())
    assert measures["val_loss"] == 2.1
    assert measures["train_loss"] == pytest.approx(np.mean(falling()[190:]))
    assert measures["diverged"] == 0
    assert measures["max_vio_global"] == 0.25
    assert measures["dead_experts"] == 1


def test_no_loss_is_above_that_before_training() -> None:
    measures = measure(series(validation={"val/loss": 9.0}), config())
    assert measures["val_loss"] == 5.5
    assert measures["diverged"] == 0


@pytest.mark.parametrize("last", [math.nan, 1.0])
def test_a_run_that_diverged_has_the_loss_before_training(last: float) -> None:
    # Its last loss may be finite, for gradients alone can be lost; its last validation was long before.
    run = series([*falling()[:99], last], outcome="diverged", validation={"val/loss": 2.5})
    measures = measure(run, config())
    assert (measures["val_loss"], measures["train_loss"], measures["diverged"]) == (5.5, 5.5, 1.0)
    assert all(math.isfinite(value) for value in measures.values())


@pytest.mark.parametrize(("end", "diverged"), [(5.4, 0.0), (5.6, 1.0), (math.nan, 1.0)])
def test_a_run_whose_end_is_above_its_start_has_diverged(end: float, diverged: float) -> None:
    loss = [*falling()[:190], *[end] * 10]
    measures = measure(series(loss, validation={"val/loss": 5.0}), config())
    assert measures["diverged"] == diverged
    assert measures["val_loss"] == (5.5 if diverged else 5.0)
    assert measures["train_loss"] == pytest.approx(5.5 if diverged else 5.4)


def test_one_bad_step_at_the_end_is_no_divergence() -> None:
    assert measure(series([*falling()[:199], 20.0]), config())["diverged"] == 0


def test_a_validation_that_is_not_finite_has_diverged() -> None:
    measures = measure(series(validation={"val/loss": math.nan, "moe/max_vio_global": math.nan}), config())
    assert measures["diverged"] == 1
    assert measures["val_loss"] == 5.5
    assert "max_vio_global" not in measures


def test_a_run_lost_before_its_first_validation_has_no_measures_of_it() -> None:
    measures = measure(series([5.5, math.nan], outcome="diverged", validation={}), config())
    assert set(MEASURES) - OF_EVENTS - set(measures) == {"max_vio_global", "dead_experts", "grad_spikes", *OF_TOKENS}
    assert measures["loss_spikes"] == 100


def test_a_dense_model_has_no_measures_of_experts_and_no_clip_no_rate() -> None:
    train = {"train/loss": falling(), "train/grad_norm": [1.0] * STEPS, "train/step_seconds": [0.25] * STEPS}
    measures = measure(Series("finished", STEPS, train, {"val/loss": 2.0}), config())
    assert set(MEASURES) - OF_EVENTS - set(measures) == OF_EXPERTS | OF_CLIP


def test_time_is_that_of_the_whole_schedule_at_the_median_step() -> None:
    run = series(falling()[:80], outcome="diverged")
    measures = measure(replace(run, train={**run.train, "train/step_seconds": [9.0] + [0.25] * 79}), config())
    assert (measures["steps"], measures["step_ms"], measures["train_seconds"]) == (200, 250, 50)


def test_real_experts_are_those_of_the_last_half_or_of_the_config() -> None:
    assert measure(series(), config())["real_experts_mean"] == 2
    run = series()
    counted = replace(run, train={**run.train, "moe/real_experts_mean": [9.0] * 100 + [1.4, 1.6] * 50})
    assert measure(counted, config())["real_experts_mean"] == pytest.approx(1.5)


def test_load_balance_early_and_late() -> None:
    max_vio = [2.0] * 20 + [1.0] * 140 + [0.4, 0.6] * 10 + [0.1, 0.3] * 10
    measures = measure(series(max_vio=max_vio), config())
    assert measures["max_vio_early"] == pytest.approx(2.0)
    assert measures["max_vio_late"] == pytest.approx(0.2)
    # Of 0.4, 0.6 and 0.1, 0.3: their means lie 0.15 off the mean of all, they 0.1 off those.
    assert measures["max_vio_late_std"] == pytest.approx(math.hypot(0.15, 0.1))


def test_the_late_load_of_a_run_that_diverged_is_the_last_it_had() -> None:
    max_vio = [1.0] * 60 + [3.0] * 20
    run = series(falling()[:80], max_vio, outcome="diverged")
    assert measure(run, config())["max_vio_late"] == 3.0


@pytest.mark.parametrize(("end", "steps"), [(2.8, 69), (3.2, STEPS)])
def test_balance_is_reached_when_the_mean_of_20_steps_is_near_the_noise(end: float, steps: int) -> None:
    # 20 steps at 2.8 from step 50 on are all under 3 only at step 69; before, one is far above.
    max_vio = [100 * FLOOR] * 49 + [end * FLOOR] * 151
    assert measure(series(max_vio=max_vio), config())["steps_to_balance"] == steps


def test_balance_is_not_reached_by_a_moment_of_it() -> None:
    max_vio = [FLOOR] * 19 + [100 * FLOOR] * 181
    assert measure(series(max_vio=max_vio), config())["steps_to_balance"] == STEPS


def test_the_noise_is_that_of_the_stages_batch() -> None:
    # A quarter of the tokens, twice the noise.
    stages = [{"steps": 100, "global_batch_size": 4}, {"steps": 100}]
    run = series(max_vio=[4 * FLOOR] * STEPS)
    assert measure(run, config(schedule={"kind": "stages", "stages": stages}))["steps_to_balance"] == 20
    assert measure(run, config())["steps_to_balance"] == STEPS


def test_a_stage_begins_with_its_first_step() -> None:
    # Just out of balance for 20 steps; then a sixteenth of the tokens, so that even one step makes up for them.
    stages = [{"steps": 20}, {"steps": 180, "global_batch_size": 1}]
    run = series(max_vio=[3.2 * FLOOR] * STEPS)
    assert measure(run, config(schedule={"kind": "stages", "stages": stages}))["steps_to_balance"] == 21


def test_spikes_are_counted_in_loss_and_in_gradient() -> None:
    loss, norm = falling(), np.random.default_rng(0).normal(1.0, 0.05, STEPS)
    loss[149] += 3.0
    norm[[119, 159]] += 2.0
    norm[9] = 60.0
    measures = measure(series(loss, grad_norm=norm.tolist()), config())
    # After 20 steps of warm-up 50 fill the window.
    assert measures["loss_spikes"] == pytest.approx(100 / 130)
    assert measures["grad_spikes"] == pytest.approx(200 / 130)


def test_the_clip_rate_is_that_of_the_steps_that_were_taken() -> None:
    clipped = [1.0] * 20 + [0.0] * 59 + [math.nan]
    run = series([*falling()[:79], math.nan], clipped=clipped, outcome="diverged")
    assert measure(run, config())["clip_rate"] == pytest.approx(20 / 79)


def test_steps_that_were_corrupted_on_purpose_are_left_out() -> None:
    steps = frozenset({5, 100, 195, 200})
    loss, max_vio = falling(), [0.5] * STEPS
    clean = measure(series(loss, max_vio), config(), steps)
    for step in steps:
        loss[step - 1], max_vio[step - 1] = 90.0, 7.0
    clipped = [float(step in steps) for step in range(1, STEPS + 1)]
    corrupted = measure(series(loss, max_vio, clipped=clipped), config(), steps)
    assert corrupted == clean | {"clip_rate": 0.02}
    seen = measure(series(loss, max_vio), config())
    assert seen["diverged"] == 1
    assert seen["loss_spikes"] > 0
    assert seen["max_vio_late"] > clean["max_vio_late"]


@pytest.mark.parametrize("outcome", ["stopped", "failed", "refused"])
def test_a_run_that_did_not_come_to_its_end_has_no_measures(outcome: str) -> None:
    with pytest.raises(ValueError, match=outcome):
        measure(series(outcome=outcome), config())


@pytest.mark.parametrize("loss", [[], [math.nan, 3.0]])
def test_a_run_without_a_first_loss_cannot_be_measured(loss: list[float]) -> None:
    with pytest.raises(ValueError, match="first step's loss"):
        measure(series(loss, outcome="diverged"), config())


def test_a_run_of_nothing_but_corrupted_steps_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="every step"):
        measure(series(), config(), frozenset(range(1, STEPS + 1)))


RISING = {"kind": "linear", "start": 0.0, "end": 0.5}
REST = {"kind": "linear", "start": 0.5, "end": 1.0}
FALLING = {"kind": "linear", "start": 1.0, "end": 0.0}


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ({"kind": "simple", "steps": 100, "warmup_steps": 30}, 30),
        ({"kind": "simple", "steps": 100, "warmup_steps": 0}, 0),
        ({"kind": "stages", "stages": [{"steps": 7, "lr": RISING}, {"tokens": 1025, "lr": REST}, {"steps": 50}]}, 9),
        ({"kind": "stages", "stages": [{"steps": 9}, {"steps": 5, "lr": RISING}]}, 0),
        ({"kind": "stages", "stages": [{"steps": 9, "lr": FALLING}]}, 0),
    ],
)
def test_the_warm_up_is_the_first_stages_that_rise(schedule: dict[str, Any], steps: int) -> None:
    data = {"global_batch_size": 16, "sequence_length": 64}
    assert warmup_steps(TrainerConfig.model_validate({"schedule": schedule, "data": data})) == steps
