"""What happened to a run beside its steps: workers that died, checkpoints that could not be written. For people.

A file of JSON lines in the run's folder, which any of its processes may append to: driver, Ray Train's controller, the
training worker of rank 0.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.json_lines import append_json

_log = logging.getLogger(__name__)

Kind = Literal["death", "error", "checkpoint", "resume", "stage", "spike", "exploit"]


@dataclass(frozen=True)
class Note:
    """Something that a user should know of."""

    kind: Kind
    text: str
    """One line."""
    details: dict[str, str] = field(default_factory=dict)
    """What a developer wants to see, for instance the traceback of each rank that failed."""
    time_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)


def add_note(path: Path, note: Note) -> None:
    """Append a note with one write call. What cannot be written is logged: notes never stop training."""
    try:
        append_json(path, asdict(note))
    except OSError as error:
        _log.warning("%s (not recorded: %s)", note.text, error)


def read_notes(path: Path) -> list[Note]:
    """All notes of a run, the oldest first. A line that a full disk cut short is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    notes = []
    for line in lines:
        try:
            notes.append(Note(**json.loads(line)))
        except ValueError:
            continue
    return notes
