"""The measures of one run, from its series: `tuning.measure_names` says what each of them is."""

import math
from collections.abc import Sequence, Set
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from moe.config.schedule import LinearLr, Stage
from moe.config.trainer import TrainerConfig
from moe.schedule import Timeline
from pipelines.config import RunConfig
from tuning.measure_names import OF_CLIP, OF_EXPERTS, OF_SPIKES, OF_TOKENS
from tuning.noise_floor import noise_floor, varying_noise_floor
from tuning.series import Series
from tuning.spike_score import first_scored_step, spike_score

# Times what uniform random routing has. Neighbours in text route alike, so that no rule comes near 1.
_BALANCED = 3.0
_BALANCE_STEPS = 20

Floats = npt.NDArray[np.float64]


def measure(series: Series, config: TrainerConfig, excluded_steps: Set[int] = frozenset()) -> dict[str, float]:
    """All measures that the run has; all of them finite.

    Measures of experts are missing for a dense model, ``clip_rate`` without a clip, those of the validation set if the
    run diverged before its first validation, and the spike scores if it ended before there was anything to score.

    A run that diverged has the loss before training (that of its first step) as its losses, and no run has more
    (arXiv 2309.14322 caps them so): how far a diverged loss happened to rise says nothing. Shares of the steps are
    those of the whole schedule; if it diverged, the last ones are the last that it did.

    Args:
        series: What the run has left.
        config: What it was run with.
        excluded_steps: Optimizer steps, from 1, whose batch was corrupted on purpose. What was measured on such a
            batch tells of the batch and not of the model, so it is left out; what follows counts. A clip that acted
            there did act: ``clip_rate`` has them.

    Raises:
        ValueError: The run neither finished nor diverged, or its first loss is not finite, or no step counts.
    """
    if series.outcome not in ("finished", "diverged"):
        raise ValueError(f"only a run that finished or diverged has measures, and this one was {series.outcome}")
    measures = _losses(series, excluded_steps)
    seconds = series.step_seconds
    measures |= {"steps": float(series.steps), "step_ms": 1e3 * seconds, "train_seconds": series.steps * seconds}
    warmup = warmup_steps(config)
    scores = {"loss_spikes": "train/loss", "grad_spikes": "train/grad_norm"}
    for name, metric in scores.items():
        score = spike_score(series.train[metric], series.steps, warmup, excluded_steps)
        if score is not None:
            measures[name] = score
    if "moe/max_vio_batch" in series.train:
        measures |= _balance(series, config, excluded_steps)
    validated = {"max_vio_global": "moe/max_vio_global", "dead_experts": "moe/dead_experts"}
    for name, metric in validated.items():
        if math.isfinite(value := series.validation.get(metric, math.nan)):
            measures[name] = value
    _, clipped = _counted(series.train.get("train/clipped", ()))
    if len(clipped):
        measures["clip_rate"] = float(clipped.mean())
    return measures


def warmup_steps(config: TrainerConfig) -> int:
    """Optimizer steps of the schedule's first stages in which the learning rate rises along a line."""

    def rises(stage: Stage) -> bool:
        return isinstance(stage.lr, LinearLr) and stage.lr.end > stage.lr.start

    return sum(config.steps_of(stage) for stage in takewhile(rises, config.schedule.as_stages()))


def why_missing(measure: str, config: RunConfig) -> str | None:
    """Why a run that finishes cannot have the measure; None where it has."""
    if measure in OF_TOKENS and not config.validation.per_token:
        return "validation.per_token is false"
    if measure in OF_CLIP and config.stability.clip.kind == "none":
        return "stability.clip.kind is none"
    if measure in OF_EXPERTS and config.model.moe.num_experts == 0:
        return "model.moe.num_experts is 0"
    needed = first_scored_step(warmup_steps(config))
    if measure in OF_SPIKES and config.steps < needed:
        return f"its {config.steps} steps are too few: the spike score begins at step {needed}"
    return None


def _losses(series: Series, excluded_steps: Set[int]) -> dict[str, float]:
    losses = series.train["train/loss"]
    if not losses or not math.isfinite(losses[0]):
        raise ValueError("the first step's loss is missing or not finite, so there is nothing to compare the end with")
    untrained = float(losses[0])
    _, counted = _counted(losses, excluded_steps, finite=False)
    if not len(counted):
        raise ValueError("every step that the run did is excluded, so nothing can be said of it")
    end = float(_last(counted, 5, series.steps).mean())
    # Written so that an end that is NaN has diverged.
    ended_well = series.outcome == "finished" and end <= untrained and math.isfinite(series.validation["val/loss"])
    if not ended_well:
        return {"val_loss": untrained, "train_loss": untrained, "diverged": 1.0}
    return {"val_loss": min(float(series.validation["val/loss"]), untrained), "train_loss": end, "diverged": 0.0}


def _balance(series: Series, config: TrainerConfig, excluded_steps: Set[int]) -> dict[str, float]:
    steps, max_vio = _counted(series.train["moe/max_vio_batch"], excluded_steps)
    if not len(max_vio):
        return {}
    moe, timeline = config.model.moe, Timeline(config)
    moments = [timeline.at(int(step) - 1) for step in steps]
    tokens = [m.global_batch_size * m.sequence_length for m in moments]
    if moe.experts_vary:
        floors = [varying_noise_floor(moe.num_experts, moe.mean_experts, number) for number in tokens]
    else:
        floors = [noise_floor(moe.num_experts, moe.top_k, number) for number in tokens]
    # Without the metric every token has as many.
    every_step = series.train.get("moe/real_experts_mean", [float(moe.top_k)] * len(series.train["train/loss"]))
    _, real_experts = _counted(every_step, excluded_steps)
    return {
        "real_experts_mean": float(_last(real_experts, 50, series.steps).mean()),
        "max_vio_early": float(max_vio[: _percent(10, series.steps)].mean()),
        "max_vio_late": float(_last(max_vio, 10, series.steps).mean()),
        "max_vio_late_std": float(_last(max_vio, 20, series.steps).std()),
        "steps_to_balance": float(_first_balanced(steps, max_vio - _BALANCED * np.array(floors), series.steps)),
    }


def _first_balanced(steps: npt.NDArray[np.int64], excess: Floats, never: int) -> int:
    """The first of ``steps`` at which the mean of the last 20 of ``excess`` is not above 0."""
    if len(excess) < _BALANCE_STEPS:
        return never
    trailing = np.lib.stride_tricks.sliding_window_view(excess, _BALANCE_STEPS).mean(axis=1)
    balanced = np.flatnonzero(trailing <= 0)
    return int(steps[balanced[0] + _BALANCE_STEPS - 1]) if len(balanced) else never


def _counted(
    values: Sequence[float], excluded_steps: Set[int] = frozenset(), finite: bool = True
) -> tuple[npt.NDArray[np.int64], Floats]:
    """The steps that are not excluded, and their values; ``finite`` leaves out what is not."""
    every = np.array(values, dtype=np.float64)
    counts = np.array([step not in excluded_steps for step in range(1, len(every) + 1)], dtype=bool)
    if finite:
        counts &= np.isfinite(every)
    return np.flatnonzero(counts) + 1, every[counts]


def _percent(percent: int, steps: int) -> int:
    """So many percent of ``steps``, rounded up."""
    return -(-percent * steps // 100)


def _last(values: Floats, percent: int, steps: int) -> Floats:
    return values[-_percent(percent, steps) :]
