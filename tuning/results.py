"""What the trials of a study have shown, by arm, grid point and seed. Imports no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True, order=True)
class TrialKey:
    """Which trial of a study."""

    seed: int
    arm: str
    point: float | None = None
    """Value of the grid's key; None without a grid."""

    @property
    def name(self) -> str:
        """The most telling part first."""
        return f"{self.arm}-{self.point:g}-s{self.seed}" if self.point is not None else f"{self.arm}-s{self.seed}"


@dataclass(frozen=True)
class TrialResult:
    """What one trial has shown."""

    key: TrialKey
    measures: Mapping[str, float]
    """By `tuning.measure_names`; all finite. What a run without experts or clip cannot have is missing."""


class Results:
    """The trials of whole blocks: a seed of which a trial is missing is left out, so that arms stay paired."""

    def __init__(self, trials: Iterable[TrialResult], arms: Iterable[str], points: Iterable[float | None]) -> None:
        found = {trial.key: trial for trial in trials}
        wanted = [(arm, point) for arm in arms for point in points]
        self._found = found
        self.seeds = [
            seed
            for seed in sorted({key.seed for key in found})
            if all(TrialKey(seed, arm, point) in found for arm, point in wanted)
        ]
        """Seeds of whole blocks, rising."""

    def value(self, measure: str, seed: int, arm: str, point: float | None = None) -> float:
        """A measure of one trial. KeyError if that run has no such measure."""
        return self._found[TrialKey(seed, arm, point)].measures[measure]

    def has(self, measure: str, arm: str, point: float | None = None) -> bool:
        """Whether the runs of this arm have the measure."""
        return all(measure in self._found[TrialKey(seed, arm, point)].measures for seed in self.seeds)

    def values(self, measure: str, arm: str, points: Iterable[float | None]) -> list[float]:
        """The mean over points of a measure, by seed; empty if there is no whole block or a run lacks the measure."""
        wanted = list(points)
        if not all(self.has(measure, arm, point) for point in wanted):
            return []
        return [fmean(self.value(measure, seed, arm, point) for point in wanted) for seed in self.seeds]
