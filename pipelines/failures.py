"""What a failure of workers was: a death, after which they start again, or an error that would only come back."""

from collections.abc import Mapping, Sequence
from typing import Any

import ray.train

from pipelines.errors import first_line
from pipelines.notes import Note, add_note
from pipelines.operations import record_operation
from pipelines.run_folder import RunFolder
from pipelines.spike_event import Kind

# What a rank says whose peer has died: gloo, NCCL, and torch's store.
_LOST_PEER = ("gloo", "nccl", "connection", "broken pipe", "socket")
# What it says whose peer is there and does not answer, in the same order.
_SILENT_PEER = ("timed out waiting", "watchdog caught collective operation timeout", "wait timeout after")


class WorkerFailures(ray.train.UserCallback):  # type: ignore[misc]  # ray.train has no types
    """Runs in Ray Train's controller and records every failure of a run's workers, before these start again."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Called with what each failed rank raised; for a dead one that is an error of Ray's."""
        note = failure_note(worker_exceptions)
        add_note(self._folder.notes, note)
        record_operation(self._folder, failure_kind(worker_exceptions), "restart_workers", note.text)


def failure_kind(errors: Mapping[int, Exception]) -> Kind:
    """The kind of event that the failure of these ranks is."""
    if _own_mistakes(errors):
        return "worker_error"
    is_stall = not _dead(errors) and any(_is_silent_peer(error) for error in errors.values())
    return "worker_stall" if is_stall else "worker_death"


def failure_note(errors: Mapping[int, Exception]) -> Note:
    """One line on the failure of these ranks. If any made a mistake of its own, that is what happened."""
    details = {str(rank): "\n".join([str(error), *getattr(error, "__notes__", [])]) for rank, error in errors.items()}
    if own := _own_mistakes(errors):
        error = errors[min(own)]
        return Note("error", f"worker {min(own)} failed: {type(error).__name__}: {first_line(error)}", details)
    dead, kind = _dead(errors), failure_kind(errors)
    ranks = ", ".join(str(rank) for rank in sorted(dead or errors))
    what = "died" if dead else "waited for its peers in vain" if kind == "worker_stall" else "lost its peers"
    return Note("death", f"worker {ranks} {what}; starting again", details)


def hopeless(notes: Sequence[Note]) -> str | None:
    """Why starting again would not help, if the last two failures were the same error; for the workers to ask.

    Once more is tried, because a file system or a device may have had a bad moment.
    """
    failures = [note for note in notes if note.kind in ("death", "error")][-2:]
    if len(failures) < 2 or any(note.kind == "death" for note in failures) or failures[0].text != failures[1].text:
        return None
    return failures[1].text


def _dead(errors: Mapping[int, Exception]) -> list[int]:
    return [rank for rank, error in errors.items() if type(error).__module__.startswith("ray.")]


def _own_mistakes(errors: Mapping[int, Exception]) -> list[int]:
    dead = _dead(errors)
    return [
        rank
        for rank, error in errors.items()
        if rank not in dead and not _lost_a_peer(error) and not _is_silent_peer(error)
    ]


def _lost_a_peer(error: Exception) -> bool:
    return any(sign in str(error).lower() for sign in _LOST_PEER)


def _is_silent_peer(error: Exception) -> bool:
    return any(sign in str(error).lower() for sign in _SILENT_PEER)
