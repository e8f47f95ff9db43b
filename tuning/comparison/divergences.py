"""Which values of keys, alone or two together, tell the runs that diverged from those that did not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

from tuning.comparison.comparing import Comparison
from tuning.comparison.effects import Side, splits
from tuning.comparison.runs import ComparedRun

_LEVEL = 0.05


@dataclass(frozen=True)
class Pattern:
    """Runs of one kind against all others."""

    sides: tuple[Side, ...]
    """What they have in common: one side of a key, or of each of two."""
    diverged: int
    runs: int
    diverged_elsewhere: int
    runs_elsewhere: int
    chance: float
    """Of so many divergences among them if those fell on runs blindly, times the number of patterns looked at (so that
    it may be above 1)."""

    @property
    def is_seen(self) -> bool:
        """Whether it is beyond chance."""
        return self.chance <= _LEVEL

    @property
    def kind(self) -> str:
        """In words."""
        return " with ".join(side.words for side in self.sides)


def pattern_of_divergences(comparison: Comparison) -> Pattern | None:
    """The pattern least likely by chance: of two keys only if it is less likely than any of one."""
    sides = [side for key in comparison.keys for split in splits(comparison, key) for side in (split.left, split.right)]
    pairs = [both for both in combinations(sides, 2) if both[0].key != both[1].key]
    ended = [run for run in comparison.runs if run.state in ("finished", "diverged")]
    alone = list(_patterns([(side,) for side in sides], ended))
    together = list(_patterns(pairs, ended))
    return min([*alone, *together], key=lambda pattern: (pattern.chance, len(pattern.sides)), default=None)


def _patterns(kinds: Sequence[tuple[Side, ...]], runs: Sequence[ComparedRun]) -> Iterator[Pattern]:
    total = sum(run.state == "diverged" for run in runs)
    for kind in kinds:
        chosen = [run for run in runs if all(side.has(run) for side in kind)]
        diverged = sum(run.state == "diverged" for run in chosen)
        if diverged and len(chosen) < len(runs):
            chance = blind_chance(diverged, len(chosen), total, len(runs)) * len(kinds)
            yield Pattern(kind, diverged, len(chosen), total - diverged, len(runs) - len(chosen), chance)


def blind_chance(marked_drawn: int, drawn: int, marked: int, runs: int) -> float:
    """How likely at least ``marked_drawn`` of ``drawn`` are marked if ``marked`` of ``runs`` are (Fisher's test)."""
    most = min(drawn, marked)
    ways = sum(comb(marked, k) * comb(runs - marked, drawn - k) for k in range(marked_drawn, most + 1))
    return ways / comb(runs, drawn)
