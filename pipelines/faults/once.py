"""What happens once in a run: the base of such faults, and the record of those that are over.

Once means once on the timeline that holds. A step that is repeated after a rewind is repeated without its fault, which
was taken back. Workers that start again from a checkpoint repeat steps of the timeline that holds as they were: a fault
of training is part of them, like what has been decided about spikes (`pipelines.journal`); one of operations is not,
or else the run would be killed again and again.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe.hooks import StepHook
from moe.parallel import Ranks
from moe.schedule import Moment
from moe.trainer import Trainer
from pipelines.errors import UserError
from pipelines.fault_config import OPERATIONS
from pipelines.first_rank import from_first_rank
from pipelines.journal import Journal
from pipelines.run_folder import RunFolder, read_json, write_json

_log = logging.getLogger(__name__)


class FaultRecord:
    """Which faults are over, by their places in ``faults``; the same on every rank, and never rewound.

    A file in the run's folder, which rank 0 writes BEFORE a fault happens: one that kills the run does not wait for it
    when it comes back. With each fault stands how often the run had gone back by then.
    """

    def __init__(self, folder: RunFolder, ranks: Ranks) -> None:
        """Collective. UserError if the file, or the run's journal, is damaged."""
        self._path, self._journal, self._ranks = folder.faults, folder.journal, ranks
        self._over: set[int] = set(from_first_rank(ranks, self._read))

    def claim(self, number: int, kind: str, step: int) -> bool:
        """Whether the fault is to happen now; if so, these workers do not meet it again. Collective."""
        if number in self._over:
            return False
        noted = from_first_rank(self._ranks, lambda: self._note(number, kind, step))
        if noted:
            self._over.add(number)
        return noted

    def is_over(self, number: int) -> bool:
        """Whether the fault is not to happen any more."""
        return number in self._over

    def _read(self) -> list[int]:
        rewinds = Journal.read(self._journal).rewinds
        try:
            happened = read_json(self._path).get("happened", [])
            return [int(fault["number"]) for fault in happened if not _is_repeated(fault, rewinds)]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._path} is damaged ({error}); without it faults that are over would come again"
            ) from error

    def _note(self, number: int, kind: str, step: int) -> bool:
        try:
            content = read_json(self._path)
            fault = {"number": number, "kind": kind, "step": step, "rewinds": len(Journal.read(self._journal).rewinds)}
            content["happened"] = [*content.get("happened", []), fault]
            write_json(self._path, content)
        except OSError as error:
            _log.warning("%s cannot be written, so faults.%d does not happen: %s", self._path, number, error)
            return False
        return True


def _is_repeated(fault: Mapping[str, Any], rewinds: Sequence[int]) -> bool:
    """Whether a fault that has happened does so again when workers that start again come to its step.

    One whose record has no count of rewinds never does: a replay leaves it out.
    """
    if fault["kind"] in OPERATIONS or "rewinds" not in fault:
        return False
    return all(step >= fault["step"] for step in rewinds[fault["rewinds"] :])


@dataclass(frozen=True)
class Scene:
    """Where a fault happens."""

    number: int
    """Its place in ``faults``."""
    seed: int
    trainer: Trainer = field(repr=False)
    folder: RunFolder
    record: FaultRecord = field(repr=False)

    @property
    def ranks(self) -> Ranks:
        """The ranks of the trainer."""
        return self.trainer.ranks

    def begins(self, kind: str, step: int, moment: Moment) -> bool:
        """Whether a fault of optimizer step ``step`` (from 1) is to happen at ``moment``.

        Collective at that step.
        """
        return moment.step + 1 == step and self.record.claim(self.number, kind, step)


class FaultHook(StepHook):
    """Base of faults: a hook that knows its scene."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
