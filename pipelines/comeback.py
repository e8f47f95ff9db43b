"""Notices that training is as far again as it was when something stopped it."""

import time

from moe.hooks import Seen, StepHook
from moe.trainer import Trainer
from pipelines.operations import FAILURES, open_operations, settle
from pipelines.run_folder import RunFolder


class Comeback(StepHook):
    """Settles the events that a failure of workers has left open. Rank 0's alone writes."""

    def __init__(self, trainer: Trainer, folder: RunFolder) -> None:
        """For a trainer whose state has been taken up."""
        self._folder = folder
        is_first = trainer.ranks.rank == 0
        self._goal = (
            max((event.step for event in open_operations(folder, FAILURES)), default=None) if is_first else None
        )
        if self._goal is not None and trainer.steps_done == trainer.timeline.steps:
            self._settle(trainer.steps_done)  # there is no step to come

    def takes(self, seen: Seen) -> bool:
        """When the last of the steps that were done before is done again."""
        if self._goal is not None and seen.step >= self._goal:
            self._settle(seen.step)
        return True

    def _settle(self, step: int) -> None:
        settle(self._folder, FAILURES, step, now_ms=time.time_ns() // 1_000_000)
        self._goal = None
