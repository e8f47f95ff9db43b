"""Where the workers of a nested trial wait at its rungs: until the scheduler has said that it goes on.

Without that a trial that is to end would train on until it is told. All workers see the folder, and none can be called
from outside while it trains. Imports no torch.
"""

import time

from pipelines.run_folder import RunFolder, read_json, write_json

_POLL_S = 0.05


def open_gate(folder: RunFolder, step: int) -> None:
    """Let the workers of a run pass the rung of an optimizer step, and those before it."""
    write_json(folder.path / "gate.json", {"step": step})


def wait_at_gate(folder: RunFolder, step: int) -> None:
    """Wait until the gate of a step is open. Whoever is not to pass is ended by Ray."""
    while read_json(folder.path / "gate.json").get("step", -1) < step:
        time.sleep(_POLL_S)
