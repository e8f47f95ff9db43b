"""Which trial of a study comes next: whole blocks, one after the other, as long as the budget holds them."""

import time
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Literal

from tuning.results import TrialKey
from tuning.study_config import StudyConfig


class Blocks:
    """Hands out the trials of a study. A block is a seed through every arm and point.

    The first block that is not whole is always begun; a later one only if, at the pace so far, it ends within the
    budget. A block that is begun is finished.
    """

    def __init__(
        self,
        config: StudyConfig,
        slots: int,
        seconds_per_trial: float,
        done: Iterable[TrialKey] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            config: the study.
            slots: trials that run at a time.
            seconds_per_trial: an estimate, for as long as none has ended.
            done: trials that need not run, being finished already.
            clock: seconds; the budget runs from now on.
        """
        self._config = config
        self._slots = slots
        self._clock = clock
        self._began = clock()
        self._done = set(done)
        self._running: dict[TrialKey, float] = {}
        self._estimate = seconds_per_trial
        self._durations: list[float] = []
        self._blocks = blocks_of(config)
        self._waiting: list[TrialKey] = []
        self._new = 0
        self.begun = 0
        """Blocks that are whole, or will be when what runs and waits has ended."""

    def next(self) -> TrialKey | Literal["wait", "end"]:
        """A trial to run now; ``wait`` while the next one needs another's result, ``end`` if there is none any more."""
        while not self._waiting:
            if self.begun == len(self._blocks):
                return "end"
            block = [key for key in self._blocks[self.begun] if key not in self._done]
            if block and self._new and not self._fits(len(block)):
                return "end"
            self._new += bool(block)
            self.begun += 1
            self._waiting = block
        for index, key in enumerate(self._waiting):
            if self._done.issuperset(self._needed(key)):
                del self._waiting[index]
                self._running[key] = self._clock()
                return key
        return "wait"

    def ended(self, key: TrialKey) -> None:
        """A trial has its result."""
        self._durations.append(self._clock() - self._running.pop(key))
        self._done.add(key)

    def started(self, key: TrialKey) -> None:
        """A trial that was handed out has begun to run only now."""
        self._running[key] = self._clock()

    @property
    def seconds_left(self) -> float:
        """Of what has been begun, at the pace so far."""
        return self._seconds(self.left)

    @property
    def left(self) -> int:
        """Trials of the blocks begun that have no result yet."""
        return len(self._running) + len(self._waiting)

    def _fits(self, trials: int) -> bool:
        elapsed = self._clock() - self._began
        return elapsed + self._seconds(self.left + trials) <= 60 * self._config.budget_minutes

    def _seconds(self, trials: int) -> float:
        per_trial = fmean(self._durations) if self._durations else self._estimate
        return trials * per_trial / self._slots

    def _needed(self, key: TrialKey) -> set[TrialKey]:
        """The trials whose results this one's config depends on."""
        return {TrialKey(key.seed, other, key.point) for other in self._config.arms[key.arm].needs}


def blocks_of(config: StudyConfig) -> list[list[TrialKey]]:
    """All trials of a study if nothing ends it before, block by block."""
    return [_block(config, seed) for seed in range(config.first_seed, config.first_seed + config.blocks)]


def _block(config: StudyConfig, seed: int) -> list[TrialKey]:
    """Those that wait for another's result come last, so that nobody idles."""
    arms = sorted(config.arms, key=lambda arm: bool(config.arms[arm].needs))
    return [TrialKey(seed, arm, point) for arm in arms for point in config.points()]
