"""What a run has measured so far, put together from the records of its spool."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Self

from pipelines.spool import REWIND, TRAIN, Record, SpoolReader, live

UI_POINTS = 320
"""The MLflow UI samples a chart to this many points per run and metric (seen with MLflow 3.17)."""

# The first steps carry start-up: allocations, first kernels, connections between the workers.
WARM_UP_STEPS = 3


@dataclass
class Series:
    """One metric over time: finite values in the order in which they were recorded."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """Add a point."""
        self.steps.append(step)
        self.values.append(value)

    def cut(self, step: int) -> "Series":
        """Take out the points after ``step`` and return them."""
        kept = sum(1 for s in self.steps if s <= step)
        taken = Series(self.steps[kept:], self.values[kept:])
        del self.steps[kept:], self.values[kept:]
        return taken


@dataclass
class History:
    """All metrics of a run."""

    series: dict[str, Series] = field(default_factory=dict)
    rewound: dict[str, Series] = field(default_factory=dict)
    """What steps had measured that were taken back, in the order in which that happened; steps may repeat."""
    first_non_finite: dict[str, int] = field(default_factory=dict)
    """The step at which a metric was first NaN or infinite."""
    first_step: int | None = None
    last_step: int = 0
    """The last optimizer step that was recorded, 0 before the first."""
    diverged: bool = False
    """Whether a loss or the gradient's norm was NaN or infinite when it was last measured."""
    _lost: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, spool: Path) -> Self:
        """The history of a run from its spool."""
        history = cls()
        history.extend(SpoolReader(spool).read())
        return history

    def extend(self, records: Iterable[Record]) -> None:
        """Add newer records."""
        for record in records:
            if record.kind == REWIND:
                self._go_back(record.step)
                continue
            if record.kind == TRAIN:
                self.first_step = record.step if self.first_step is None else self.first_step
                self.last_step = record.step
            for name, value in record.metrics.items():
                self.series.setdefault(name, Series()).add(record.step, value)
            for name in record.non_finite:
                self.first_non_finite.setdefault(name, record.step)
            self._lost -= record.metrics.keys()
            self._lost |= set(record.non_finite)
        self.diverged = not self._lost.isdisjoint(("train/loss", "train/grad_norm", "val/loss"))

    def _go_back(self, step: int) -> None:
        """What was measured after ``step`` is of a timeline that is over."""
        self.last_step = min(self.last_step, step)
        self._lost.clear()  # training goes back to a step that was finite
        for name, series in self.series.items():
            taken = series.cut(step)
            over = self.rewound.setdefault(name, Series())
            over.steps += taken.steps
            over.values += taken.values

    def last(self, name: str) -> float | None:
        """The last finite value of a metric, None if there is none."""
        series = self.series.get(name)
        return series.values[-1] if series and series.values else None

    def shown(self, name: str) -> float | None:
        """What a metric is now, for people: the last value, NaN if that was not finite."""
        return math.nan if name in self._lost else self.last(name)

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the steps, without those that carry start-up."""
        series = self.series.get("train/tokens_per_second")
        return median(steady(series.values)) if series and series.values else None

    def finals(self) -> dict[str, float]:
        """Figures of the run's end, finite and rounded: what runs are compared by."""
        figures = {"final/diverged": float(self.diverged)}
        for metric, figure in (("train/loss", "final/loss"), ("val/loss", "final/val_loss")):
            value = self.last(metric)
            if value is not None:
                figures[figure] = round(value, 4)
        return figures


def steady(values: Sequence[float]) -> Sequence[float]:
    """The values after start-up; all of them while there are no others."""
    return values[WARM_UP_STEPS:] or values


class WindowMaximum:
    """The largest value in each window of steps, so that a spike of one step survives the sampling of the UI.

    Windows end at multiples of their length and at the last step of the schedule.
    """

    def __init__(self, total_steps: int, every_steps: int = 1, metric: str = "train/loss") -> None:
        """Make windows so long that at most `UI_POINTS` of them are in ``total_steps``, and no shorter than
        ``every_steps``, which is how often points are recorded."""
        self.total_steps = total_steps
        self.metric = metric
        least = math.ceil(total_steps / UI_POINTS)
        self.length = math.ceil(least / every_steps) * every_steps
        self._maximum = -math.inf

    def restore(self, records: Iterable[Record], step: int) -> None:
        """Take up the window that ``step``, the last step taken before a resume, lies in."""
        start = step - step % self.length
        self._maximum = max(
            (
                record.metrics[self.metric]
                for record in live(records)
                if start < record.step <= step and self.metric in record.metrics
            ),
            default=-math.inf,
        )

    def update(self, step: int, value: float) -> float | None:
        """Add a step's value, NaN and infinities not counting; the maximum if a window ends here, else None."""
        if math.isfinite(value):
            self._maximum = max(self._maximum, value)
        if step % self.length and step != self.total_steps:
            return None
        maximum, self._maximum = self._maximum, -math.inf
        return maximum if math.isfinite(maximum) else None
