"""What a treatment did to a spike, and what it costs in loss. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from pipelines.outcome import Ending
from pipelines.run_folder import RunFolder
from pipelines.spike_event import Kind, read_events
from pipelines.spool import TRAIN, VALIDATION, SpoolReader, live
from tuning.replay_plan import Plan

Verdict = Literal["avoided", "smaller", "same", "larger", "diverged", "no effect"]
"""avoided: no event from the spike's onset to the end of the replay. diverged: loss or gradient is not finite. In
between the highest score tells: smaller by a fifth at least, larger by a quarter at least. no effect: not a bit of any
loss is another."""

_SMALLER, _LARGER = 0.8, 1.25
# Of what an event was seen in, the metrics of the score and of the value; the loss stands for all that has no score.
_SERIES: dict[Kind, tuple[str, str]] = {
    "loss": ("spike/score_loss", "train/loss"),
    "grad_norm": ("spike/score_grad_norm", "train/grad_norm"),
    "max_vio": ("spike/score_max_vio", "moe/max_vio_batch"),
}
# Of so many last steps the training loss is the mean.
_LAST_STEPS = 10


@dataclass(frozen=True)
class Measured:
    """One treatment's trial."""

    diverged: bool
    events: int
    """From the onset on."""
    score: float | None
    """The highest reading of the detector from the onset on, of the series that the event was of."""
    peak: float | None
    """The highest value of that series."""
    train_loss: float | None
    """Mean of the last steps of the replay, after the event's; None if it was not finite, or never came to that."""
    val_loss: float | None
    """After the last step."""
    losses: tuple[float | None, ...] = ()
    """The training loss of every step, in order."""

    def figures(self) -> dict[str, float]:
        """As metrics of the trial's run."""
        named = {
            "replay/score": self.score,
            "replay/peak": self.peak,
            "replay/train_loss": self.train_loss,
            "replay/val_loss": self.val_loss,
        }
        figures = {name: value for name, value in named.items() if value is not None}
        return {**figures, "replay/events": float(self.events), "replay/diverged": float(self.diverged)}


def measure_replay(plan: Plan, folder: RunFolder, ending: Ending) -> Measured:
    """Measure a trial that has ended from what it left in its folder."""
    records = live(SpoolReader(folder.spool).read())
    train = {record.step: record for record in records if record.kind == TRAIN}
    score, value = _SERIES.get(plan.event.kind, _SERIES["loss"])
    window = [train[step].metrics for step in range(plan.onset, plan.until + 1) if step in train]
    lost = any(name in record.non_finite for record in train.values() for name in ("train/loss", "train/grad_norm"))
    last = range(max(min(plan.event.step + 1, plan.until), plan.until - _LAST_STEPS + 1), plan.until + 1)
    losses = [train[step].metrics.get("train/loss") for step in last if step in train]
    validations = [r.metrics.get("val/loss") for r in records if r.kind == VALIDATION and r.step == plan.until]
    return Measured(
        diverged=lost or ending.outcome == "diverged",
        events=sum(each.is_training and each.step >= plan.onset for each in read_events(folder.events)),
        score=_highest(window, score),
        peak=_highest(window, value),
        train_loss=fmean(finite) if len(finite := [x for x in losses if x is not None]) == len(last) else None,
        val_loss=validations[-1] if validations else None,
        losses=tuple(train[step].metrics.get("train/loss") for step in sorted(train)),
    )


def judge_replay(measured: Measured, plain: Measured) -> Verdict:
    """What became of the spike, against ``plain``, the treatment that changes nothing."""
    if measured is not plain and measured.losses == plain.losses:
        return "no effect"
    if measured.diverged:
        return "diverged"
    if not measured.events:
        return "avoided"
    if plain.diverged:
        return "smaller"
    if measured.score is None or plain.score is None:
        return "same"
    if measured.score <= _SMALLER * plain.score:
        return "smaller"
    return "larger" if measured.score >= _LARGER * plain.score else "same"


def cost(value: float | None, other: float | None) -> float | None:
    """How much higher a loss is than another; None if either is not there."""
    return None if value is None or other is None else value - other


def best(losses: Sequence[float | None]) -> float | None:
    """The lowest of those that there are."""
    return min((loss for loss in losses if loss is not None), default=None)


def _highest(steps: Sequence[Mapping[str, float]], name: str) -> float | None:
    highest = max((metrics[name] for metrics in steps if name in metrics), default=math.nan)
    return None if math.isnan(highest) else highest
