"""The last point on the way that nearly all runs have come to, where most of them never came to the end.

A scheduler that ends trials leaves a few that finished, and among those hardly two that differ in one key alone. All
have a validation at its first rung, though, and there nobody was chosen yet: later ones are of those alone that were
good at it. What is seen there is no forecast of the end (a short horizon misleads, arXiv 1803.02021).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pipelines.description import count
from pipelines.spike_words import counted
from tuning.comparison.comparing import Comparison
from tuning.comparison.runs import ComparedRun

EARLY_ONLY = "Early only"
"""Begins what is said of it."""

# A few that were stopped before it must not put the point so early that it says nothing.
_NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Early:
    """The point, and who has validated at it."""

    tokens: int
    """Training tokens."""
    runs: tuple[ComparedRun, ...]
    """Finished or not, but none that diverged, and none of a seed that only the winners were given."""
    finished: int
    """How many of them came to the end."""

    @cached_property
    def _ids(self) -> frozenset[str]:
        return frozenset(run.info.id for run in self.runs)

    @property
    def after(self) -> str:
        """In words, with the whole of it: after 32.8 k of 262 k tokens."""
        budgets = sorted({run.budget for run in self.runs})
        whole = count(budgets[0]) if len(budgets) == 1 else f"{count(budgets[0])} to {count(budgets[-1])}"
        return f"after {count(self.tokens)} of {whole} tokens"

    @property
    def words(self) -> str:
        """The same, and with how many runs."""
        return f"{self.after}, {counted(len(self.runs), 'run')} of which {self.finished} finished"

    def loss(self, run: ComparedRun) -> float | None:
        """Validation loss there in nats per token; None of a run that is not among these."""
        return self._at("val/loss", run)

    def max_vio(self, run: ComparedRun) -> float | None:
        """MaxVio there over the validation set; None of a run that is not among these, and of no experts."""
        return self._at("moe/max_vio_global", run)

    def spikes(self, run: ComparedRun) -> float | None:
        """How many there were by then; None of a run that is not among these."""
        return float(run.spikes_by(self.tokens)) if run.info.id in self._ids else None

    def _at(self, metric: str, run: ComparedRun) -> float | None:
        return run.at(metric, self.tokens) if run.info.id in self._ids else None


def early_point(comparison: Comparison) -> Early | None:
    """The last point that nearly all runs have validated at, diverged ones aside.

    None where most of them are compared at the end, for then that says more, and where no point before the end has more
    runs than the end has.
    """
    places = {
        run.info.id: set(run.curve("val/loss")[0])
        for run in comparison.runs
        if run.state != "diverged" and "val/loss" in run.history.series
    }
    runs = _of_common_seeds([run for run in comparison.runs if places.get(run.info.id)])
    at_end = sum(comparison.loss(run) is not None for run in runs)
    if 2 * at_end > len(runs):
        return None
    # The end of a short run is no point on the way, even if it is one of a longer run's.
    end = min((run.budget for run in runs), default=0)
    reached = Counter(place for run in runs for place in places[run.info.id] if place < end)
    most = max(reached.values(), default=0)
    if most <= at_end:
        return None
    tokens = max(place for place, number in reached.items() if number >= _NEARLY_ALL * most)
    there = tuple(run for run in runs if tokens in places[run.info.id])
    return Early(tokens, there, sum(run.state == "finished" for run in there))


def _of_common_seeds(runs: Sequence[ComparedRun]) -> tuple[ComparedRun, ...]:
    """Without those of seeds that only a few configurations have: they were run again because they did well."""
    numbers = Counter(run.seed for run in runs)
    fewest = max(numbers.values(), default=0) / 2
    return tuple(run for run in runs if numbers[run.seed] >= fewest)


def early_keys(keys: Sequence[str]) -> list[str]:
    """Those whose early effects say something: not the schedule, nor anything that lasts a number of steps.

    A longer warm-up has a higher loss early, whatever comes of it: by then the key says how far the run has come.
    """
    return [key for key in keys if not key.startswith("schedule.") and not key.endswith("_steps")]
