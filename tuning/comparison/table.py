"""The table of configurations: the same cells for the page, for Markdown and for the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from pipelines.progress import clock
from tuning.comparison.comparing import Comparison, Configuration, by_seed
from tuning.comparison.early import Early, early_point
from tuning.comparison.keys import shown
from tuning.comparison.runs import ComparedRun
from tuning.report import plus_minus
from tuning.statistics import Interval, interval

NOTHING = "–"
"""In place of what there is not."""


@dataclass(frozen=True)
class Cell:
    """What is written, and what a column is sorted by."""

    text: str
    order: float | str = 0.0


@dataclass(frozen=True)
class Sheet:
    """A table."""

    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def texts(self) -> list[list[str]]:
        """Of all cells."""
        return [[cell.text for cell in row] for row in self.rows]


# Sorted after all numbers.
_LAST = 1e300


def configurations_sheet(comparison: Comparison) -> Sheet:
    """A row for each configuration, the best first; early losses, too, where most runs have no other."""
    early = early_point(comparison)
    figures = (
        "seeds",
        "validation loss",
        "difference to the reference",
        "MaxVio",
        *_early_heading(early),
        "spikes",
        "steps lost",
        "diverged",
        "time",
    )
    headings = ("", *comparison.keys, *figures)
    return Sheet(headings, tuple(_row(comparison, early, each) for each in comparison.configurations))


def _early_heading(early: Early | None) -> Sequence[str]:
    return () if early is None else (f"validation loss {early.after}",)


def _row(comparison: Comparison, early: Early | None, each: Configuration) -> tuple[Cell, ...]:
    tokens, runs = comparison.tokens, each.runs
    values = [_value(each, key) for key in comparison.keys]
    difference = comparison.difference(each)
    lost = f"{each.diverged} of {len(runs)}" if each.diverged else "0"
    seconds = each.training_seconds
    return (
        Cell(f"#{each.number}", float(each.number)),
        *values,
        _seeds(each),
        _interval(each.loss),
        Cell(difference.words, difference.paired.mean if difference.paired else _LAST),
        _interval(each.max_vio),
        *_early_loss(early, each.runs),
        _mean([run.spikes_by(tokens) for run in runs]),
        _mean([run.steps_lost_by(tokens) for run in runs]),
        Cell(lost, each.diverged / len(runs)),
        Cell(clock(seconds), seconds) if seconds is not None else Cell(NOTHING, _LAST),
    )


def _early_loss(early: Early | None, runs: Sequence[ComparedRun]) -> Sequence[Cell]:
    if early is None:
        return ()
    losses = by_seed(runs, early.loss)
    return (_interval(interval(list(losses.values())) if losses else None),)


def _value(each: Configuration, key: str) -> Cell:
    if key not in each.values:
        return Cell(NOTHING, _LAST)
    value = each.values[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(shown(value), float(value) if is_number and value is not None else shown(value))


def _seeds(each: Configuration) -> Cell:
    finished, every = len(each.losses), len(each.seeds)
    return Cell(str(every) if finished == every else f"{finished} of {every} finished", float(finished))


def _interval(found: Interval | None) -> Cell:
    if found is None:
        return Cell(NOTHING, _LAST)
    return Cell(plus_minus(found) if found.n > 1 else f"{found.mean:.4f}", found.mean)


def _mean(values: Sequence[int]) -> Cell:
    mean = fmean(values)
    return Cell(f"{mean:.1f}".removesuffix(".0"), mean)


def runs_sheet(comparison: Comparison) -> Sheet:
    """A row for each run, by configuration."""
    early = early_point(comparison)
    figures = ("validation loss", "MaxVio", *_early_heading(early), "spikes", "steps lost", "tokens", "state")
    runs = [run for each in comparison.configurations for run in each.runs]
    rows = tuple(_run_row(comparison, early, run) for run in runs)
    return Sheet(("configuration", "run", "seed", *figures), rows)


def _run_row(comparison: Comparison, early: Early | None, run: ComparedRun) -> tuple[Cell, ...]:
    number, tokens = comparison.number_of[run.info.id], comparison.tokens
    spikes, lost = run.spikes_by(tokens), run.steps_lost_by(tokens)
    return (
        Cell(f"#{number}", float(number)),
        Cell(run.info.name, run.info.name),
        Cell(str(run.seed), float(run.seed)),
        _figure(comparison.loss(run), 4),
        _figure(comparison.max_vio(run), 3),
        *_early_loss(early, [run]),
        Cell(str(spikes), float(spikes)),
        Cell(str(lost), float(lost)),
        Cell(f"{run.tokens:,}", float(run.tokens)),
        Cell(run.words, run.words),
    )


def _figure(value: float | None, digits: int) -> Cell:
    return Cell(NOTHING, _LAST) if value is None else Cell(f"{value:.{digits}f}", value)
