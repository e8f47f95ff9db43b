"""From the reports of a trial's steps to its `Series`, and where a run keeps that."""

import math
from pathlib import Path

from pipelines.loop import StepDone
from pipelines.run_folder import RunFolder
from pipelines.spool import TRAIN, VALIDATION, SpoolReader, SpoolWriter, live, records_of_step
from tuning.series import Series

# Of all that a step reports, what measures are made of; MLflow has the rest, not of every step.
_METRICS = (
    "train/loss",
    "train/grad_norm",
    "train/step_seconds",
    "moe/max_vio_batch",
    "moe/real_experts_mean",
    "train/clipped",
)


class SeriesRecorder:
    """Collects what every step reports in a file of the run's: a trial that is begun again goes on with it.

    One process at a time may have one for a run; the run's writer lock sees to that.
    """

    def __init__(self, folder: RunFolder, steps: int) -> None:
        """``steps``: optimizer steps that the schedule has."""
        self._steps = steps
        self._file = _steps_file(folder)
        self._writer = SpoolWriter(self._file)

    def add(self, done: StepDone) -> None:
        """One step; one that is repeated after a restart is known already, one after a rewind is another."""
        found = {**done.report.metrics, "train/step_seconds": done.seconds}
        self._writer.write(TRAIN, done.report.step, {name: found[name] for name in _METRICS if name in found})
        if done.validation is not None:
            self._writer.write(VALIDATION, done.report.step, done.validation)
        if done.rewound_to is not None:
            self._writer.rewind(done.rewound_to)

    def series(self, outcome: str) -> Series:
        """What there is by now. A metric that a step lacks (one that was not taken has no clip) is NaN."""
        records = live(SpoolReader(self._file).read())
        train = {record.step: record for record in records if record.kind == TRAIN}
        steps = [train[step].metrics if step in train else {} for step in range(1, max(train, default=0) + 1)]
        named = {name for record in train.values() for name in (*record.metrics, *record.non_finite)}
        last = max((r for r in records if r.kind == VALIDATION), key=lambda record: record.step, default=None)
        return Series(
            outcome,
            self._steps,
            {name: [metrics.get(name, math.nan) for metrics in steps] for name in _METRICS if name in named},
            {**last.metrics, **dict.fromkeys(last.non_finite, math.nan)} if last is not None else {},
        )

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


def _steps_file(folder: RunFolder) -> Path:
    return folder.path / "steps.jsonl"


def first_loss(folder: RunFolder) -> float | None:
    """The training loss of a trial's first step, nats per token; None if it did not come so far, or was not finite."""
    records = records_of_step(_steps_file(folder), 1)
    return next((record.metrics.get("train/loss") for record in records if record.kind == TRAIN), None)


def series_file(folder: RunFolder) -> Path:
    """Where a trial's series is."""
    return folder.path / "series.json"


def read_series(folder: RunFolder) -> Series:
    """A trial's series."""
    return Series.read(series_file(folder))
