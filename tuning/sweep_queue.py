"""Which trial of a sweep comes next: the search as long as the budget goes, then the final. Imports no torch."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tuning.objective import configurations, ranked
from tuning.space_config import Values
from tuning.suggest import make_suggester
from tuning.sweep_journal import Phase, SweepJournal, TrialState
from tuning.sweep_loading import SweepPlan


@dataclass(frozen=True)
class Next:
    """A trial to begin."""

    number: int
    """Of its configuration."""
    seed: int
    values: Values
    phase: Phase


class SweepQueue:
    """Hands out trials. What an earlier command left unfinished comes first; the journal says what that is."""

    def __init__(
        self,
        plan: SweepPlan,
        journal: SweepJournal,
        slots: int,
        tokens_per_step: int,
        seconds_before: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            plan: the sweep.
            journal: what it has done so far; trials are told to it before the next is asked for.
            slots: trials that run at a time.
            tokens_per_step: what a trial reads in an optimizer step.
            seconds_before: how long earlier commands have run.
            clock: seconds.
        """
        self._plan, self._journal, self._slots, self._tokens = plan, journal, slots, tokens_per_step
        self._clock, self._began = clock, clock() - seconds_before
        self._suggester = make_suggester(plan.config)
        self._told: set[int] = set()
        self._waiting: list[Next] = []
        begun = [trial.begun for trial in journal.trials.values()]
        self._configurations = 1 + max((trial.number for trial in begun), default=-1)
        for number in range(self._configurations):
            values = next(trial.values for trial in begun if trial.number == number)
            self._suggester.begun(number, values)
            known = {trial.seed for trial in begun if trial.number == number}
            self._waiting += [
                Next(number, seed, values, "search") for seed in self._seeds(plan.config.seeds) if seed not in known
            ]
        # A final that was interrupted goes on after the search, which has nothing to do unless its budget has grown.
        self._final = False
        self.exhausted: str | None = None
        """Why no further configuration is begun, once that is so."""

    def next(self) -> Next | Literal["wait", "end"]:
        """A trial to begin now; ``wait`` while that depends on those that run, ``end`` if there is none any more."""
        self._tell()
        if not self._waiting and self.exhausted is None and not self._final:
            self._suggest()
        if not self._waiting and self._plan.config.confirm is not None:
            if self._running():
                return "wait"
            if not self._final:
                self._final = True
                self._waiting = self._finalists(self._plan.config.confirm.top, self._plan.config.confirm.seeds)
        return self._waiting.pop(0) if self._waiting else "end"

    @property
    def seconds(self) -> float:
        """How long the sweep has run, earlier commands included."""
        return self._clock() - self._began

    @property
    def left(self) -> int | None:
        """Trials that are still to come if the budget holds them; None where it does not count trials."""
        config = self._plan.config
        if self._final:
            return len(self._waiting)
        if self.exhausted is not None:
            return len(self._waiting) + self._in_final
        limits = [limit for limit in (config.budget.trials, self._size()) if limit is not None]
        return max(0, min(limits) - len(self._searched())) + self._in_final if limits else None

    def seconds_left(self, under_way: int) -> float | None:
        """At the pace so far; None before there is one, or where no end is known.

        ``under_way``: optimizer steps that the trials have done which run.
        """
        per_trial, left, budget = self._per_trial(), self.left, self._plan.config.budget.minutes
        limits = [max(0.0, 60 * budget - self.seconds)] if budget is not None else []
        if per_trial is not None and left is not None:
            limits.append((left + len(self._running()) - under_way / self._plan.steps) * per_trial / self._slots)
        return min(limits, default=None)

    @property
    def _in_final(self) -> int:
        """Trials of a whole final."""
        config = self._plan.config
        if config.confirm is None:
            return 0
        limits = [limit for limit in (config.budget.trials, self._size()) if limit is not None]
        top = min([config.confirm.top, *(limit // config.seeds for limit in limits)])
        return top * (config.confirm.seeds - config.seeds)

    def _size(self) -> int | None:
        """Trials of a whole grid."""
        return self._plan.points * self._plan.config.seeds if self._plan.points is not None else None

    def _seeds(self, count: int) -> range:
        return range(self._plan.first_seed, self._plan.first_seed + count)

    def _running(self) -> list[TrialState]:
        return [trial for trial in self._journal.trials.values() if trial.ended is None]

    def _tell(self) -> None:
        for configuration in configurations(self._searched()):
            if configuration.number in self._told or len(configuration.trials) < self._plan.config.seeds:
                continue
            self._told.add(configuration.number)
            if (verdict := configuration.verdict(self._plan.config.objective)) is not None:
                self._suggester.tell(configuration.number, configuration.values, verdict)

    def _searched(self) -> list[TrialState]:
        return [trial for trial in self._journal.trials.values() if trial.begun.phase == "search"]

    def _suggest(self) -> None:
        """Put another configuration in line, if the budget has room for it."""
        self.exhausted = self._spent()
        if self.exhausted is not None:
            return
        values = self._suggester.suggest(self._configurations)
        if values is None:
            self.exhausted = "every point of the space was tried"
            return
        seeds = self._seeds(self._plan.config.seeds)
        self._waiting = [Next(self._configurations, seed, values, "search") for seed in seeds]
        self._configurations += 1

    def _spent(self) -> str | None:
        """What of the budget has no room for another configuration; None if all has."""
        budget, seeds = self._plan.config.budget, self._plan.config.seeds
        if budget.trials is not None and len(self._searched()) + seeds > budget.trials:
            return f"the budget of {budget.trials} trials is spent"
        if budget.tokens is not None:
            every = self._journal.trials.values()
            done = sum(trial.ended.step if trial.ended else self._plan.steps for trial in every)
            if (done + (seeds + self._in_final) * self._plan.steps) * self._tokens > budget.tokens:
                return f"the budget of {budget.tokens:,} tokens has no room for another configuration"
        if budget.minutes is not None:
            needed = (len(self._running()) + seeds + self._in_final) * (self._per_trial() or 0.0) / self._slots
            if self.seconds + needed > 60 * budget.minutes:
                return f"the budget of {budget.minutes:g} minutes has no room for another configuration"
        return None

    def _per_trial(self) -> float | None:
        """Seconds of one that goes to its end, by the pace of the steps so far: many are ended early."""
        every = [trial.ended for trial in self._journal.trials.values() if trial.ended]
        ended = [trial for trial in every if not trial.resumed]
        steps = sum(trial.step for trial in ended)
        return sum(trial.seconds for trial in ended) / steps * self._plan.steps if steps else None

    def _finalists(self, top: int, seeds: int) -> list[Next]:
        # By the search alone, so that a final that goes on has the same configurations in it.
        found = [one for one in configurations(self._searched()) if one.outcome == "finished"]
        best = ranked(found, self._plan.config.objective)[:top]
        begun = {(trial.begun.number, trial.begun.seed) for trial in self._journal.trials.values()}
        # Seed by seed, so that what is interrupted is paired as far as it goes.
        return [
            Next(one.number, seed, one.values, "final")
            for seed in self._seeds(seeds)
            for one in best
            if (one.number, seed) not in begun
        ]
