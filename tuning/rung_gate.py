"""Where the workers of a nested trial wait at its rungs: until the scheduler has said whether it goes on.

Without that a trial that is to end would train on until it is told. All workers see the folder, and none can be called
from outside while it trains. On a full disk nobody is heard until there is room again. Imports no torch.
"""

import logging
import time
from pathlib import Path
from typing import Any

from pipelines.run_folder import RunFolder, read_json, write_json

_log = logging.getLogger(__name__)

_POLL_S = 0.05
# Between two attempts on a full disk.
_FULL_S = 5.0


def forget_gate(folder: RunFolder) -> None:
    """Before a trial begins, or begins again: what was said before counts no more."""
    _gate(folder).unlink(missing_ok=True)
    _knock(folder).unlink(missing_ok=True)


def knock(folder: RunFolder, step: int, loss: float) -> None:
    """Of rank 0: say that the trial stands at the rung of an optimizer step, with a validation loss (nats per token).

    Waits for room on the disk: the loss is what the scheduler goes by.
    """
    while not _is_written(_knock(folder), {"step": step, "loss": loss}):
        time.sleep(_FULL_S)


def knocked(folder: RunFolder) -> tuple[int, float] | None:
    """The rung at which a trial stands, or stood last, with its loss; None before the first."""
    said = read_json(_knock(folder))
    return (said["step"], said["loss"]) if said else None


def open_gate(folder: RunFolder, step: int) -> bool:
    """Let the workers of a run pass the rung of a step, and those before it. False if that cannot be written."""
    return _is_written(_gate(folder), {"step": step, "goes_on": True})


def close_gate(folder: RunFolder, step: int) -> bool:
    """Let the workers of a run end at the rung of a step. False if that cannot be written."""
    return _is_written(_gate(folder), {"step": step, "goes_on": False})


def wait_at_gate(folder: RunFolder, step: int) -> bool:
    """Wait until it is known whether the trial goes on after its rung at a step; whether it does."""
    while (said := read_json(_gate(folder))).get("step", -1) < step:
        time.sleep(_POLL_S)
    return bool(said["goes_on"])


def _is_written(path: Path, content: dict[str, Any]) -> bool:
    try:
        write_json(path, content)
    except OSError as error:
        _log.warning("%s cannot be written yet, and the trial waits at its rung: %s", path, error)
        return False
    return True


def _gate(folder: RunFolder) -> Path:
    return folder.path / "gate.json"


def _knock(folder: RunFolder) -> Path:
    return folder.path / "knock.json"
