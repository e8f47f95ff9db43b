"""What a configuration is worth, over its seeds, and which is best. Imports no torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from tuning.space_config import Values
from tuning.suggest import Verdict
from tuning.sweep_config import ObjectiveConfig
from tuning.sweep_journal import TrialOutcome, TrialState

LOSS = "val_loss"
# What stands for a measure that a trial does not have: a bad one.
_UNMEASURED = 1e3
_ORDER: tuple[TrialOutcome, ...] = ("finished", "pruned", "diverged", "failed")


@dataclass(frozen=True)
class Configuration:
    """A configuration and its trials, all of them over."""

    number: int
    values: Values
    trials: tuple[TrialState, ...]

    @property
    def outcome(self) -> TrialOutcome:
        """The worst of its trials': a configuration that diverged with one seed of three is not stable."""
        return max((trial.ended.outcome for trial in self.trials if trial.ended), key=_ORDER.index)

    @property
    def seeds(self) -> list[int]:
        """Of its trials, rising."""
        return sorted(trial.begun.seed for trial in self.trials)

    def mean(self, measure: str) -> float | None:
        """Over its trials; None if one has no such measure."""
        found = [trial.ended.measures.get(measure) for trial in self.trials if trial.ended]
        known = [value for value in found if value is not None]
        return fmean(known) if known and len(known) == len(found) else None

    def violations(self, objective: ObjectiveConfig) -> dict[str, float]:
        """By how much its mean exceeds each constraint; at most 0 where it does not."""
        found = {name: self.mean(name) for name in objective.constraints}
        return {name: value - objective.constraints[name] for name, value in found.items() if value is not None}

    def is_feasible(self, objective: ObjectiveConfig) -> bool:
        """Whether it finished with all seeds and keeps every constraint."""
        kept = all(by <= 0 for by in self.violations(objective).values())
        return self.outcome == "finished" and kept

    def verdict(self, objective: ObjectiveConfig) -> Verdict | None:
        """As a searcher wants to know it; None for one that failed for reasons of the machine."""
        losses = [trial.ended.measures[LOSS] for trial in self.trials if trial.ended and LOSS in trial.ended.measures]
        if self.outcome == "failed" or not losses:
            return None
        pruned = [trial.step for trial in self.trials if trial.ended and trial.ended.outcome == "pruned"]
        further = [self.mean(name) for name in objective.further]
        return Verdict(
            (fmean(losses), *(value if value is not None else _UNMEASURED for value in further)),
            # One that diverged breaks a constraint that every sweep has; its loss is that of guessing.
            (float(self.outcome == "diverged"), *self.violations(objective).values()),
            max(pruned) if pruned and self.outcome == "pruned" else None,
        )


def configurations(trials: Iterable[TrialState]) -> list[Configuration]:
    """The configurations whose trials are all over, by number."""
    found: dict[int, list[TrialState]] = {}
    for trial in trials:
        found.setdefault(trial.begun.number, []).append(trial)
    return [
        Configuration(number, group[0].values, tuple(group))
        for number, group in sorted(found.items())
        if all(trial.ended for trial in group)
    ]


def ranked(found: Sequence[Configuration], objective: ObjectiveConfig, seeds: int = 0) -> list[Configuration]:
    """The best first: what finished and keeps the constraints by its loss, then what exceeds one by how much, then what
    was pruned by how far it came, then what diverged, the earliest last.

    What finished with ``seeds`` seeds at least comes before what has fewer, whose least loss is luck in part.
    """

    def key(configuration: Configuration) -> tuple[float, ...]:
        kind = _ORDER.index(configuration.outcome)
        loss = configuration.mean(LOSS)
        finished = configuration.outcome == "finished"
        broken = sum(by for by in configuration.violations(objective).values() if by > 0) if finished else 0.0
        far = 0.0 if finished else -fmean(trial.step for trial in configuration.trials)
        few = finished and len(configuration.trials) < seeds
        return (kind, broken, far, few, loss if loss is not None else float("inf"), configuration.number)

    return sorted(found, key=key)


def figures(measures: Mapping[str, float], step: int) -> dict[str, float]:
    """Metrics of a trial's end, as the views of sweeps show them."""
    found = {f"sweep/{name}": value for name, value in measures.items()} | {"sweep/steps": float(step)}
    return found | ({"sweep/objective": measures[LOSS]} if LOSS in measures else {})
