"""Which values of keys, alone or two together, tell the runs that diverged from those that did not."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt

from tuning.comparison.comparing import Comparison
from tuning.comparison.effects import Side, is_grid, splits

_LEVEL = 0.05
_SHUFFLES = 1000
# All shuffles of thousands of kinds at once would take gigabytes.
_PARTS = 20

Kind = tuple[Side, ...]
"""What runs have in common: one side of a key, or of each of two."""


@dataclass(frozen=True)
class Pattern:
    """Runs of one kind against all others."""

    sides: Kind
    diverged: int
    runs: int
    diverged_elsewhere: int
    runs_elsewhere: int
    chance: float
    """Of a pattern as clear as this, of as many keys, if divergences fell blindly: all that were looked at count, so
    that the best of many is no luck. In a grid they fall on runs, otherwise on configurations with all their seeds."""

    bound: float
    """The same by Bonferroni: coarser, but it goes on where no shuffle came near."""

    @property
    def is_seen(self) -> bool:
        """Whether it is beyond chance."""
        return self.chance <= _LEVEL

    @property
    def kind(self) -> str:
        """In words."""
        return " with ".join(side.words for side in self.sides)


def pattern_of_divergences(comparison: Comparison) -> Pattern | None:
    """The pattern least likely by chance: of two keys only if it is less likely than any of one.

    None if none of the runs that came to an end diverged, or none of the kinds is of some of them alone.
    """
    sides = [side for key in comparison.keys for split in splits(comparison, key) for side in (split.left, split.right)]
    pairs = [both for both in combinations(sides, 2) if both[0].key != both[1].key]
    found = [_clearest(comparison, kinds) for kinds in ([(side,) for side in sides], pairs)]
    return min(
        (pattern for pattern in found if pattern), key=lambda pattern: (pattern.chance, pattern.bound), default=None
    )


def _clearest(comparison: Comparison, kinds: Sequence[Kind]) -> Pattern | None:
    """The one of these kinds to which divergences are confined the most, by Fisher's test."""
    runs = [run for run in comparison.runs if run.state in ("finished", "diverged")]
    lost_R = np.array([run.state == "diverged" for run in runs], dtype=np.float32)
    members_KR = np.array([[all(side.has(run) for side in kind) for run in runs] for kind in kinds], dtype=np.float32)
    if not len(kinds) or not lost_R.any():
        return None
    sizes_K = members_KR.sum(axis=1).astype(int)
    some_K = (sizes_K > 0) & (sizes_K < len(runs))
    if not some_K.any():
        return None
    chances_NL = _chances(len(runs), int(lost_R.sum()))
    members_KR, sizes_K = members_KR[some_K], sizes_K[some_K]
    own_K = chances_NL[sizes_K, (members_KR @ lost_R).astype(int)]
    best = int(own_K.argmin())
    units = range(len(runs)) if is_grid(comparison) else [comparison.number_of[run.info.id] for run in runs]
    shuffled_SR = _shuffled(lost_R, units)
    as_clear = 0
    for some_SR in np.array_split(shuffled_SR, _PARTS):
        least_S = chances_NL[sizes_K[:, None], (members_KR @ some_SR.T).astype(int)].min(axis=0)
        as_clear += int((least_S <= own_K[best]).sum())
    kind = [kind for kind, some in zip(kinds, some_K, strict=True) if some][best]
    size, inside, total = int(sizes_K[best]), int(members_KR[best] @ lost_R), int(lost_R.sum())
    chance = (as_clear + 1) / (_SHUFFLES + 1)
    return Pattern(kind, inside, size, total - inside, len(runs) - size, chance, float(own_K[best]) * len(own_K))


def _shuffled(lost_R: npt.NDArray[np.float32], units: Sequence[int]) -> npt.NDArray[np.float32]:
    """Which runs are lost if what became of each unit had become of another one with as many runs.

    ``units`` has the number of each run's.
    """
    random = np.random.default_rng(0)
    shuffled_SR = np.tile(lost_R, (_SHUFFLES, 1))
    runs_of: dict[int, list[int]] = {}
    for place, unit in enumerate(units):
        runs_of.setdefault(unit, []).append(place)
    for size in sorted({len(places) for places in runs_of.values()}):
        places_CN = np.array([places for places in runs_of.values() if len(places) == size])
        order_SC = random.permuted(np.tile(np.arange(len(places_CN)), (_SHUFFLES, 1)), axis=1)
        shuffled_SR[:, places_CN.ravel()] = lost_R[places_CN][order_SC].reshape(_SHUFFLES, -1)
    return shuffled_SR


def _chances(runs: int, marked: int) -> npt.NDArray[np.float64]:
    """`blind_chance` by the number of runs drawn and of marked ones among them."""
    table_NL = np.ones((runs + 1, marked + 1))
    for drawn in range(runs + 1):
        for among in range(min(drawn, marked) + 1):
            table_NL[drawn, among] = blind_chance(among, drawn, marked, runs)
    return table_NL


def blind_chance(marked_drawn: int, drawn: int, marked: int, runs: int) -> float:
    """How likely at least ``marked_drawn`` of ``drawn`` are marked if ``marked`` of ``runs`` are (Fisher's test)."""
    most = min(drawn, marked)
    ways = sum(comb(marked, k) * comb(runs - marked, drawn - k) for k in range(marked_drawn, most + 1))
    return ways / comb(runs, drawn)
