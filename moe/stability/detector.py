"""The spike detector: which losses, gradient norms and loads of experts stand out above their own recent past.

A value is compared with the median of the 9 before it, its *level*. What is judged is the *error*, the value less its
level, by the median and the scatter of the errors of the ``window`` values before. Why each part is as it is:

- **Median of few values as the level**: up to 4 spikes in a row do not move it, and during the fall of the loss it lags
  by 5 steps only. A mean over the window would lie a whole descent above the loss, and hide every spike under it.
- **Errors are centred by their own median**: while the loss falls its level is too high by the same amount at every
  step, and that amount is no part of a spike's height.
- **Scatter that one value cannot move**: the median absolute deviation, or the 90th percentile of absolute deviations
  where that says more, both in units of a normal distribution's sigma. The second is for distributions with tails,
  such as gradient norms, of which the first sees nothing. A standard deviation grows with every spike in the window.
- **Gradient norms in logarithms**: their scatter is in proportion to their size. They must be a multiple of what was to
  be expected besides: in undisturbed runs one in a hundred lies over 5 deviations out, and one in 12,500 was 12.7 times
  as large as those before it, from a batch that nothing is wrong with.
- **MaxVio as it is**: a router that collapses need not show in the loss for long, and the load of the busiest expert
  jumps at once. It must rise by ``max_vio_rise`` besides, since the scatter of a well balanced load is next to nothing.
- **What stands out stays out**: a spike that became part of the past would hide the next (rolling windows that hold a
  spike of 12 over losses of 3 miss jumps to 5 and 7 that follow within the window). But only for so long
  (``accept_after`` in a row): a level that stays is accepted.
- **What is not finite stays out at any time**, and is its own kind of event. A single NaN in a rolling window makes
  every comparison false, which is a detector that is blind and says all is well.

All series are those of the global batch, the norm before clipping (after it there is nothing to see), and equal on
every rank bit for bit: all ranks come to the same verdict without another exchange.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from moe.config.detector import DetectorConfig, RobustDetectorConfig

Series = Literal["loss", "grad_norm", "max_vio"]
Severity = Literal["none", "warn", "act"]

_LEVEL = 9
_LEAST_ERRORS = 20
# Of a normal distribution: sigma over the median absolute deviation, and over the 90th percentile of absolute ones.
_SIGMA_OF_MAD, _SIGMA_OF_P90 = 1.4826, 0.6080
# Scatter below that of rounding, relative to the level, is a series of constants.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Reading:
    """What the detector makes of one value of one series."""

    series: Series
    severity: Severity
    value: float
    """As it was given: nats, the norm itself, MaxVio."""
    baseline: float | None
    """What was to be expected, in the unit of ``value``; None without a past."""
    score: float | None
    """How far above it, in robust standard deviations of the series; None without a past, or for what is not finite."""


class RobustScore:
    """One series, judged value by value."""

    def __init__(self, config: RobustDetectorConfig) -> None:
        self._warn = config.warn
        # Newest last. Free places hold 0, and the counts say how many are taken: state is compared, which NaN is not.
        self._past = torch.zeros(config.window + _LEVEL, dtype=torch.float64)
        self._kept_out = torch.zeros(config.accept_after, dtype=torch.float64)
        self._counts = torch.zeros(2, dtype=torch.int64)

    def see(self, value: float) -> tuple[float | None, float | None]:
        """Expected value and score of a finite value, by the past before it; the value is then part of the past."""
        past = self._past[len(self._past) - int(self._counts[0]) :]
        if len(past) < _LEVEL + _LEAST_ERRORS:
            self._accept(value)
            return None, None
        levels = past.unfold(0, _LEVEL, 1).median(dim=1).values
        errors = past[_LEVEL:] - levels[:-1]
        level, centre = float(levels[-1]), float(errors.median())
        least = max(_ROUNDING * abs(level), torch.finfo(torch.float64).tiny)
        score = (value - level - centre) / max(_scatter(errors - centre), least)
        if score < self._warn:
            self._accept(value)
        else:
            self._keep_out(value)
        return level + centre, score

    def _accept(self, value: float) -> None:
        self._push(self._past, 0, value)
        self._counts[1] = 0

    def _keep_out(self, value: float) -> None:
        self._push(self._kept_out, 1, value)
        if self._counts[1] == len(self._kept_out):
            for late in self._kept_out.tolist():
                self._accept(late)

    def _push(self, ring: torch.Tensor, count: int, value: float) -> None:
        ring.copy_(ring.roll(-1))
        ring[-1] = value
        self._counts[count] = min(int(self._counts[count]) + 1, len(ring))

    def forget(self) -> None:
        """Begin anew, without a past."""
        for ring in (self._past, self._kept_out, self._counts):
            ring.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        """Values that count, values kept out since the last that does, fp64 both, and how many there are of each."""
        return {"past": self._past, "kept_out": self._kept_out, "counts": self._counts}


def _scatter(centred: torch.Tensor) -> float:
    deviations = centred.abs().sort().values
    p90 = deviations[math.ceil(0.9 * len(deviations)) - 1]
    return max(_SIGMA_OF_MAD * float(deviations.median()), _SIGMA_OF_P90 * float(p90))


class SpikeDetector:
    """Sees the loss, the gradient norm and MaxVio of every step, of the global batch, the norm before clipping."""

    def __init__(self, config: DetectorConfig) -> None:
        self.config = config
        self._scores: dict[Series, RobustScore] = {}
        if isinstance(config, RobustDetectorConfig):
            self._scores = {series: RobustScore(config) for series in get_args(Series)}

    def see(self, loss: float, grad_norm: float, max_vio: float | None = None) -> tuple[Reading, ...]:
        """What to make of each. A step with a value that is not finite leaves the past of all as it was.

        ``max_vio``: None for a model without experts, of which there is then no reading.
        """
        given: dict[Series, float | None] = {"loss": loss, "grad_norm": grad_norm, "max_vio": max_vio}
        values = {series: value for series, value in given.items() if value is not None}
        is_finite = all(math.isfinite(value) for value in values.values())
        return tuple(self._judge(series, value, is_finite) for series, value in values.items())

    def forget(self) -> None:
        """What comes is not to be compared with what was: a stage of the schedule begins, with other batches."""
        for part in self._scores.values():
            part.forget()

    def _judge(self, series: Series, value: float, is_finite: bool) -> Reading:
        if not math.isfinite(value):
            return Reading(series, "act", value, None, None)
        if series not in self._scores or not is_finite:
            return Reading(series, "none", value, None, None)
        if series == "grad_norm":
            log_baseline, score = self._scores[series].see(math.log(max(value, torch.finfo(torch.float32).tiny)))
            baseline = None if log_baseline is None else math.exp(log_baseline)
        else:
            baseline, score = self._scores[series].see(value)
        return Reading(series, self._severity(series, value, baseline, score), value, baseline, score)

    def _severity(self, series: Series, value: float, baseline: float | None, score: float | None) -> Severity:
        c = self.config
        if score is None or baseline is None or not isinstance(c, RobustDetectorConfig):
            return "none"
        if series == "max_vio" and value < baseline + c.max_vio_rise:
            return "none"
        ratio = value / baseline if series == "grad_norm" else math.inf
        if score >= c.act and ratio >= c.act_norm_ratio:
            return "act"
        return "warn" if score >= c.warn and ratio >= c.warn_norm_ratio else "none"

    def state(self) -> dict[str, torch.Tensor]:
        """Live tensors by name, the same on every rank: saved and rewound with the weights."""
        return {f"{name}.{key}": tensor for name, part in self._scores.items() for key, tensor in part.state().items()}
