"""From the reports of a trial's steps to its `Series`, and where a run keeps that."""

from collections.abc import Mapping
from pathlib import Path

from moe.trainer import Report
from pipelines.run_folder import RunFolder
from tuning.series import Series

# Of all that a step reports, what measures are made of; MLflow has the rest, not of every step.
_METRICS = ("train/loss", "train/grad_norm", "moe/max_vio_batch", "train/clipped")


class SeriesRecorder:
    """Collects what every step reports; in memory, since a study's trials are short."""

    def __init__(self, steps: int) -> None:
        """``steps``: optimizer steps that the schedule has."""
        self._steps = steps
        self._train: dict[str, list[float]] = {}
        self._validation: Mapping[str, float] = {}

    def add(self, report: Report, validation: Mapping[str, float] | None) -> None:
        """One step. A metric that it lacks (a step that was not taken has no clip) is NaN."""
        for name in _METRICS:
            if name in report.metrics and name not in self._train:
                self._train[name] = [float("nan")] * (report.step - 1)
            if name in self._train:
                self._train[name].append(report.metrics.get(name, float("nan")))
        if validation is not None:
            self._validation = validation

    def series(self, outcome: str) -> Series:
        """What there is by now."""
        return Series(outcome, self._steps, self._train, dict(self._validation))


def series_file(folder: RunFolder) -> Path:
    """Where a trial's series is."""
    return folder.path / "series.json"


def read_series(folder: RunFolder) -> Series:
    """A trial's series."""
    return Series.read(series_file(folder))
