"""What a key does: runs on one side of a split of its values against those on the other.

Where there are runs that differ in this key alone, those are compared, block by block: their other keys and their seed
are the same. Otherwise (a random search has none) all configurations of one side are compared with all of the other,
each by the mean over its seeds, for those share whatever else is peculiar to it. The intervals are as much wider than
95 % as there are splits looked at for a measure, so that the best of many is no luck (Bonferroni).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb, inf
from statistics import fmean

from pipelines.flatten import Scalar
from tuning.comparison.comparing import Comparison
from tuning.comparison.keys import is_numeric, shown
from tuning.comparison.runs import ComparedRun
from tuning.statistics import CONFIDENCE, Interval, interval, pooled_interval

# Of a numeric key: more of them say hardly more, and all intervals are wider for it.
_MOST_SPLITS = 8

Measure = Callable[[ComparedRun], float | None]
Measured = tuple[ComparedRun, float]


@dataclass(frozen=True)
class Side:
    """Runs whose key has one of some values."""

    key: str
    values: frozenset[Scalar]
    phrase: str
    """What they have in common, to be put after the key: ``of 0.01 and above``."""
    against: str
    """The same, to be put after a figure that another one is compared with: ``from 0.01 on``."""

    @property
    def words(self) -> str:
        """With the key."""
        return f"{self.key} {self.phrase}"

    def has(self, run: ComparedRun) -> bool:
        """Whether a run is on it."""
        return self.key in run.settings and run.settings[self.key] in self.values


@dataclass(frozen=True)
class Split:
    """Two sides of a key; runs that do not have the key are on none."""

    left: Side
    right: Side

    @property
    def key(self) -> str:
        """The key."""
        return self.left.key


@dataclass(frozen=True)
class Effect:
    """A measure on the right side of a split against the left."""

    split: Split
    left: float
    """Mean."""
    right: float
    """Mean."""
    difference: Interval
    """Of right minus left."""
    blocks: int
    """Sets of runs that it is taken from, in each of which this key alone differs; 0 if there are none."""
    runs: tuple[ComparedRun, ...]
    """That it is taken from."""

    @property
    def is_seen(self) -> bool:
        """Whether it is beyond the noise."""
        return not self.difference.low <= 0 <= self.difference.high

    @property
    def strength(self) -> float:
        """The difference in half widths of its interval."""
        half = (self.difference.high - self.difference.low) / 2
        return abs(self.difference.mean) / max(half, 1e-12)


def splits(comparison: Comparison, key: str) -> list[Split]:
    """The splits of a key: numbers at up to 8 places between two, others each value against the rest."""
    settings = [run.settings for run in comparison.runs]
    values = list(dict.fromkeys(each[key] for each in settings if key in each))
    if is_numeric(key, settings):
        ordered = sorted(values, key=lambda value: float(value or 0))
        return [_threshold(key, ordered, place) for place in _places(len(ordered))]
    # Of two values the one says what the other does.
    chosen = values[:1] if len(values) == 2 else values if len(values) > 2 else []
    return [_one_against_others(key, value, values) for value in chosen]


def _places(values: int) -> list[int]:
    """Between which of so many values, rising, there is a split: a search at random has one for each run."""
    number = min(values - 1, _MOST_SPLITS)
    return [round(values * place / (number + 1)) for place in range(1, number + 1)]


def _threshold(key: str, ordered: Sequence[Scalar], place: int) -> Split:
    below, above = ordered[:place], ordered[place:]
    bound = shown(above[0])
    return Split(_side(key, below, f"below {bound}", f"below {bound}"), _side(key, above, f"of {bound} and above"))


def _one_against_others(key: str, value: Scalar, values: Sequence[Scalar]) -> Split:
    others = [other for other in values if other != value]
    words = f"other than {shown(value)}"
    return Split(_side(key, [value], ""), _side(key, others, words, "with all others"))


def _side(key: str, values: Sequence[Scalar], phrase: str, against: str | None = None) -> Side:
    """A single value is called by its name."""
    if len(values) == 1:
        return Side(key, frozenset(values), shown(values[0]), f"with {shown(values[0])}")
    return Side(key, frozenset(values), phrase, against or f"from {shown(values[0])} on")


def is_grid(comparison: Comparison) -> bool:
    """Whether every key has configurations that differ in it alone, so that it is seeds that are drawn.

    Of a random search it is the configurations that are drawn, and what one of them does with all of its seeds may be
    peculiar to it.
    """
    return all(_differs_alone(comparison, key) for key in comparison.keys)


def _differs_alone(comparison: Comparison, key: str) -> bool:
    others = [other for other in comparison.keys if other != key]
    places = [tuple((k in each.values, each.values.get(k)) for k in others) for each in comparison.configurations]
    return len(set(places)) < len(places)


def same_runs(comparison: Comparison, side: Side, runs: Sequence[ComparedRun]) -> list[Side]:
    """Sides of other keys that hold the same of these runs, one for each key: the runs cannot tell them apart."""
    wanted = [side.has(run) for run in runs]
    found: dict[str, Side] = {}
    for key in comparison.keys:
        for split in splits(comparison, key) if key != side.key else ():
            for other in (split.left, split.right):
                if [other.has(run) for run in runs] == wanted:
                    found.setdefault(key, other)
    return list(found.values())


def effects(
    comparison: Comparison, measure: Measure, keys: Sequence[str] | None = None, looks: int | None = None
) -> dict[str, list[Effect]]:
    """The effect of every split on a measure, by key; a key without runs on both sides has none.

    Args:
        comparison: of the runs.
        measure: of a run; None leaves it out.
        keys: that are looked at; None is all.
        looks: splits that are looked at in all, where there are more than those of ``keys``.
    """
    runs = [(run, value) for run in comparison.runs if (value := measure(run)) is not None]
    every = [split for key in (comparison.keys if keys is None else keys) for split in splits(comparison, key)]
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(every) if looks is None else looks)
    found: dict[str, list[Effect]] = {}
    for split in every:
        effect = _effect(comparison, split, runs, confidence)
        if effect is not None:
            found.setdefault(split.key, []).append(effect)
    return found


def _effect(comparison: Comparison, split: Split, runs: Sequence[Measured], confidence: float) -> Effect | None:
    blocks = _blocks(comparison, split, runs)
    if len(blocks) > 1:
        values = [([value for _, value in left], [value for _, value in right]) for left, right in blocks]
        difference = interval([fmean(right) - fmean(left) for left, right in values], confidence)
        # With nothing in them each would be as likely on the other side.
        difference = _unless_luck(difference, 2.0 ** (1 - len(blocks)), confidence)
        means = fmean(fmean(left) for left, _ in values), fmean(fmean(right) for _, right in values)
        used = tuple(run for block in blocks for side in block for run, _ in side)
        return Effect(split, *means, difference, len(blocks), used)
    both = [[(run, value) for run, value in runs if side.has(run)] for side in (split.left, split.right)]
    if not all(both):
        return None
    left, right = (_by_configuration(comparison, side) for side in both)
    if len(left) == len(right) == 1:
        # Of two configurations there is nothing but their seeds to go by.
        left, right = ([value for _, value in side] for side in both)
    used = tuple(run for side in both for run, _ in side)
    difference = pooled_interval(left, right, confidence)
    difference = _unless_luck(difference, 2 / comb(difference.n, len(left)), confidence)
    return Effect(split, fmean(left), fmean(right), difference, 0, used)


def _unless_luck(difference: Interval, chance: float, confidence: float) -> Interval:
    """An open interval where values without any spread are so few that they may well be so by chance.

    Counts as of spikes often are, and a t-interval of no width would make them the surest of all.
    """
    if difference.low < difference.high or not difference.mean or chance <= 1 - confidence:
        return difference
    return Interval(difference.mean, -inf, inf, difference.n)


def _by_configuration(comparison: Comparison, runs: Sequence[Measured]) -> list[float]:
    """The mean of each one's."""
    values: dict[int, list[float]] = {}
    for run, value in runs:
        values.setdefault(comparison.number_of[run.info.id], []).append(value)
    return [fmean(own) for own in values.values()]


def _blocks(
    comparison: Comparison, split: Split, runs: Sequence[Measured]
) -> list[tuple[list[Measured], list[Measured]]]:
    """Runs on both sides of the split that have all else in common."""
    blocks: dict[tuple[object, ...], tuple[list[Measured], list[Measured]]] = {}
    others = [key for key in comparison.keys if key != split.key]
    for run, value in runs:
        block = (run.seed, *((key in run.settings, run.settings.get(key)) for key in others))
        for number, side in enumerate((split.left, split.right)):
            if side.has(run):
                blocks.setdefault(block, ([], []))[number].append((run, value))
    return [block for block in blocks.values() if all(block)]
