"""What happens once in a run, whatever is repeated: the base of such faults, and the record of those that are over."""

import logging
from dataclasses import dataclass, field

from moe.hooks import StepHook
from moe.parallel import Ranks
from moe.schedule import Moment
from moe.trainer import Trainer
from pipelines.errors import UserError
from pipelines.first_rank import from_first_rank
from pipelines.run_folder import RunFolder, read_json, write_json

_log = logging.getLogger(__name__)


class FaultRecord:
    """Which faults have happened, by their places in ``faults``; the same on every rank, and never rewound.

    A file in the run's folder, which rank 0 writes BEFORE a fault happens: one that kills the run does not wait for it
    when it comes back.
    """

    def __init__(self, folder: RunFolder, ranks: Ranks) -> None:
        """Collective. UserError if the file is damaged."""
        self._path, self._ranks = folder.faults, ranks
        self._over: set[int] = set(from_first_rank(ranks, self._read))

    def claim(self, number: int, kind: str, step: int) -> bool:
        """Whether the fault is to happen now, for the only time. Collective."""
        if number in self._over:
            return False
        noted = from_first_rank(self._ranks, lambda: self._note(number, kind, step))
        if noted:
            self._over.add(number)
        return noted

    def is_over(self, number: int) -> bool:
        """Whether the fault has happened."""
        return number in self._over

    def _read(self) -> list[int]:
        try:
            return [int(fault["number"]) for fault in read_json(self._path).get("happened", [])]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._path} is damaged ({error}); without it faults that are over would come again"
            ) from error

    def _note(self, number: int, kind: str, step: int) -> bool:
        try:
            content = read_json(self._path)
            content["happened"] = [*content.get("happened", []), {"number": number, "kind": kind, "step": step}]
            write_json(self._path, content)
        except OSError as error:
            _log.warning("%s cannot be written, so faults.%d does not happen: %s", self._path, number, error)
            return False
        return True


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
        """Whether a fault of optimizer step ``step`` (from 1) is to happen at ``moment``, for the only time.

        Collective at that step.
        """
        return moment.step + 1 == step and self.record.claim(self.number, kind, step)


class FaultHook(StepHook):
    """Base of faults: a hook that knows its scene."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
