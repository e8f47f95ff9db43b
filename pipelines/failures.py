"""What a failure of workers was: a death, after which they start again, or an error that would only come back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray.train

from pipelines.errors import first_line
from pipelines.notes import Note, add_note

# What a rank says whose peer has died: gloo, NCCL, and torch's store.
_LOST_PEER = ("gloo", "nccl", "connection", "broken pipe", "socket")


class WorkerFailures(ray.train.UserCallback):  # type: ignore[misc]  # ray.train has no types
    """Runs in Ray Train's controller and notes every failure of a run's workers, before these start again."""

    def __init__(self, notes: Path) -> None:
        self._notes = notes

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Called with what each failed rank raised; for a dead one that is an error of Ray's."""
        add_note(self._notes, failure_note(worker_exceptions))


def failure_note(errors: Mapping[int, Exception]) -> Note:
    """One line on the failure of these ranks. If any made a mistake of its own, that is what happened."""
    details = {str(rank): "\n".join([str(error), *getattr(error, "__notes__", [])]) for rank, error in errors.items()}
    dead = [rank for rank, error in errors.items() if type(error).__module__.startswith("ray.")]
    own = [rank for rank, error in errors.items() if rank not in dead and not _lost_a_peer(error)]
    if own:
        error = errors[min(own)]
        return Note("error", f"worker {min(own)} failed: {type(error).__name__}: {first_line(error)}", details)
    ranks = ", ".join(str(rank) for rank in sorted(dead or errors))
    return Note("death", f"worker {ranks} {'died' if dead else 'lost its peers'}; starting again", details)


def hopeless(notes: Sequence[Note]) -> str | None:
    """Why starting again would not help, if the last two failures were the same error; for the workers to ask.

    Once more is tried, because a file system or a device may have had a bad moment.
    """
    failures = [note for note in notes if note.kind in ("death", "error")][-2:]
    if len(failures) < 2 or any(note.kind == "death" for note in failures) or failures[0].text != failures[1].text:
        return None
    return failures[1].text


def _lost_a_peer(error: Exception) -> bool:
    return any(sign in str(error).lower() for sign in _LOST_PEER)
