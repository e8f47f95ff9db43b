"""Where the workers of a nested trial wait at its rungs: until the scheduler has said whether it goes on.

Without that a trial that is to end would train on until it is told. All workers see the folder, and none can be called
from outside while it trains. Imports no torch.
"""

import time
from pathlib import Path

from pipelines.run_folder import RunFolder, read_json, write_json

_POLL_S = 0.05


def forget_gate(folder: RunFolder) -> None:
    """Before a trial begins, or begins again: what was said before counts no more."""
    _file(folder).unlink(missing_ok=True)


def open_gate(folder: RunFolder, step: int) -> None:
    """Let the workers of a run pass the rung of an optimizer step, and those before it."""
    write_json(_file(folder), {"step": step, "goes_on": True})


def close_gate(folder: RunFolder, step: int) -> None:
    """Let the workers of a run end at the rung of an optimizer step."""
    write_json(_file(folder), {"step": step, "goes_on": False})


def wait_at_gate(folder: RunFolder, step: int) -> bool:
    """Wait until it is known whether the trial goes on after its rung at a step; whether it does."""
    while (said := read_json(_file(folder))).get("step", -1) < step:
        time.sleep(_POLL_S)
    return bool(said["goes_on"])


def _file(folder: RunFolder) -> Path:
    return folder.path / "gate.json"
