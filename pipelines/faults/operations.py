"""Faults of operations: what happens to workers, disk, checkpoints and the tracking server."""

import logging
import os
import signal
import time
from pathlib import Path

from moe.schedule import Moment
from pipelines.checkpoint_standing import newest_valid
from pipelines.fault_config import (
    CorruptCheckpointConfig,
    DeadTrackingServerConfig,
    FullDiskConfig,
    KilledWorkerConfig,
    StalledWorkerConfig,
)
from pipelines.faults.once import FaultHook, Scene
from pipelines.first_rank import from_first_rank
from pipelines.rehearsal import cut_off, empty_disk, fill_disk

_log = logging.getLogger(__name__)


class KilledWorker(FaultHook):
    """Kills this process, if it is the rank meant."""

    def __init__(self, fault: KilledWorkerConfig, scene: Scene) -> None:
        super().__init__(scene)
        self._fault = fault

    def before_step(self, moment: Moment) -> None:
        """At the step."""
        if self.scene.begins(self._fault.kind, self._fault.step, moment) and self.scene.ranks.rank == self._fault.rank:
            _die()


class StalledWorker(FaultHook):
    """Lets this process wait, if it is the rank meant."""

    def __init__(self, fault: StalledWorkerConfig, scene: Scene) -> None:
        super().__init__(scene)
        self._fault = fault

    def before_step(self, moment: Moment) -> None:
        """At the step."""
        if self.scene.begins(self._fault.kind, self._fault.step, moment) and self.scene.ranks.rank == self._fault.rank:
            time.sleep(self._fault.seconds)


class DeadTrackingServer(FaultHook):
    """Cuts the driver's delivery off from the server, which the run does not own and so cannot stop."""

    def __init__(self, fault: DeadTrackingServerConfig, scene: Scene) -> None:
        super().__init__(scene)
        self._fault = fault

    def before_step(self, moment: Moment) -> None:
        """At the step."""
        if self.scene.begins(self._fault.kind, self._fault.step, moment) and self.scene.ranks.rank == 0:
            cut_off(self.scene.folder, self._fault.seconds)


class FullDisk(FaultHook):
    """Fills the disk, as far as checkpoints go, and empties it again at a later step."""

    def __init__(self, fault: FullDiskConfig, scene: Scene) -> None:
        super().__init__(scene)
        self._fault = fault

    def before_step(self, moment: Moment) -> None:
        """At the first step, and after the last. A restart between them finds the disk as full as it was."""
        begins = self.scene.begins(self._fault.kind, self._fault.step, moment)
        if self.scene.ranks.rank != 0:
            return
        if begins:
            fill_disk(self.scene.folder.checkpoints)
        elif moment.step == self._fault.step - 1 + self._fault.steps:
            empty_disk(self.scene.folder.checkpoints)


class CorruptCheckpoint(FaultHook):
    """Damages the newest checkpoint, and kills every worker."""

    def __init__(self, fault: CorruptCheckpointConfig, scene: Scene) -> None:
        super().__init__(scene)
        self._fault = fault

    def before_step(self, moment: Moment) -> None:
        """At the step."""
        if not self.scene.begins(self._fault.kind, self._fault.step, moment):
            return
        # No rank dies before the damage is done.
        if from_first_rank(self.scene.ranks, self._damage):
            _die()
        _log.warning("faults.%d finds no checkpoint to damage", self.scene.number)

    def _damage(self) -> bool:
        path = newest_valid(self.scene.folder.checkpoints)
        if path is None:
            return False
        file = max(path.glob("*.safetensors"), key=lambda file: file.stat().st_size)
        damage_file(file, truncate=self._fault.damage == "truncated")
        return True


def damage_file(file: Path, *, truncate: bool) -> None:
    """Let a file end half-way, or change one bit in its middle."""
    middle = file.stat().st_size // 2
    if truncate:
        os.truncate(file, middle)
        return
    with file.open("r+b") as opened:
        opened.seek(middle)
        (octet,) = opened.read(1)
        opened.seek(middle)
        opened.write(bytes([octet ^ 1]))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
