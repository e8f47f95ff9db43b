"""What a checkpoint is worth: which one a run resumes from, and which ones are kept. Imports no torch.

Beside a checkpoint's own files lies ``standing.json``. A checkpoint starts *unconfirmed*: a spike may be in it already,
finite but poisoned. It is *good* after ``checkpoint.confirm_steps`` further steps without an event. An event before
that makes it *suspect*. When a run goes back, what lies after the place is *discarded*, and its timeline is over.

A run resumes from the newest that is good or unconfirmed. Unconfirmed ones count, because to repeat the steps since the
last good one would lead to the same state bit for bit, and the wait for confirmation goes on after a resume.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.checkpoint_manifest import MANIFEST, CheckpointError, checkpoint_folders, step_of, verify
from pipelines.run_folder import write_json

STANDING = "standing.json"
_log = logging.getLogger(__name__)

State = Literal["unconfirmed", "good", "suspect", "discarded"]


class Standing(BaseModel):
    """What is known of a checkpoint since it was saved."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    state: State = "unconfirmed"
    pinned_by: tuple[str, ...] = ()
    """Events that need this checkpoint; it is not deleted while there are any."""

    @property
    def resumable(self) -> bool:
        """Whether training may go on from it."""
        return self.state in ("unconfirmed", "good")


def standing(path: Path) -> Standing:
    """The standing of the checkpoint at ``path``; one without a legible record is unconfirmed."""
    try:
        return Standing.model_validate(json.loads((path / STANDING).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Standing()
    except (OSError, ValueError, ValidationError) as error:
        _log.warning("%s cannot be read, so the checkpoint counts as unconfirmed: %s", path / STANDING, error)
        return Standing()


def mark(path: Path, state: State) -> None:
    """Change the state of the checkpoint at ``path``. OSError if that cannot be written."""
    _write(path, standing(path).model_copy(update={"state": state}))


def condemn(folder: Path, event: str) -> None:
    """After an event: what is unconfirmed is suspect, and the newest good checkpoint is pinned for it."""
    for path in checkpoint_folders(folder):
        if standing(path).state == "unconfirmed":
            mark(path, "suspect")
    if (good := newest_good(folder)) is not None:
        pin(good, event)


def pin(path: Path, event: str) -> None:
    """Keep the checkpoint at ``path`` for as long as there is the event. OSError if that cannot be written."""
    known = standing(path)
    if event not in known.pinned_by:
        _write(path, known.model_copy(update={"pinned_by": (*known.pinned_by, event)}))


def take_place(staging: Path, path: Path) -> Path | None:
    """Give the new checkpoint in ``staging`` its name, ``path``; what is to be deleted of the one that had it, if any.

    A pinned one is kept beside it, as ``step-00000040-t0`` for its timeline 0: an event needs its state, and that of a
    step that is repeated after going back may be another. A damaged one leaves its pins to the new one.
    """
    if not path.exists():
        staging.rename(path)
        return None
    replaced = path.with_name(f".{path.name}.replaced")
    if pins := standing(path).pinned_by:
        try:
            replaced = path.with_name(f"{path.name}-t{verify(path).timeline}")
        except CheckpointError:
            _write(staging, Standing(pinned_by=pins))
    path.rename(replaced)
    staging.rename(path)
    return replaced if replaced.name.startswith(".") else None


def kept_for(folder: Path, event: str) -> list[Path]:
    """The checkpoints that are pinned for an event and whose place another of the same step has taken, newest last."""
    return sorted(path for path in folder.glob("step-*-t*") if event in standing(path).pinned_by)


def newer_than(folder: Path, path: Path | None) -> list[Path]:
    """The checkpoints newer than ``path``, all of them without one, whatever they are worth."""
    paths = checkpoint_folders(folder)
    return paths[paths.index(path) + 1 :] if path is not None else paths


def newest_valid(folder: Path, most_steps: int | None = None) -> Path | None:
    """The checkpoint that a run resumes from: the newest that is resumable, with all its files whole and unchanged.

    Found by looking: every byte of the candidates is read, newest first. What is skipped is logged with the reason.
    With ``most_steps``, the newest of at most so many steps. None without one.
    """
    return next((path for path in _valid(folder) if most_steps is None or step_of(path) <= most_steps), None)


def newest_whole(folder: Path, most_steps: int) -> Path | None:
    """The newest resumable checkpoint of at most ``most_steps`` steps with all its files; their content is not read."""
    for path in reversed(checkpoint_folders(folder)):
        if step_of(path) <= most_steps and standing(path).resumable and _has_its_files(path):
            return path
    return None


def newest_good(folder: Path) -> Path | None:
    """The newest valid checkpoint whose state was followed by enough steps without an event; None without one."""
    return next((path for path in _valid(folder) if standing(path).state == "good"), None)


def _valid(folder: Path) -> Iterator[Path]:
    """Resumable checkpoints that are whole, the newest first."""
    for path in reversed(checkpoint_folders(folder)):
        if not (known := standing(path)).resumable:
            _log.warning("skipping checkpoint %s: it is %s", path, known.state)
            continue
        try:
            verify(path)
        except CheckpointError as error:
            _log.warning("skipping a checkpoint: %s", error)
        else:
            yield path


def prune(folder: Path, keep: int) -> list[Path]:
    """Delete what is not needed any more and return it. For one rank only.

    Kept are the newest ``keep`` resumable checkpoints and what is newer than the oldest of them, the newest good one,
    and pinned ones, which never go (`take_place`). Damaged and suspect ones do not count, so that they never push out
    the last that can be resumed from; discarded ones go at once.
    """
    standings = {path: standing(path) for path in reversed(checkpoint_folders(folder))}
    whole = [path for path, known in standings.items() if known.resumable and _has_its_files(path)]
    good = [path for path in whole if standings[path].state == "good"]
    pinned = [path for path, known in standings.items() if known.pinned_by]
    newest_first = list(standings)
    recent = newest_first[: newest_first.index(whole[:keep][-1])] if whole else newest_first
    needed = {*whole[:keep], *good[:1], *pinned, *(path for path in recent if standings[path].state != "discarded")}
    removed = [path for path in newest_first if path not in needed]
    for path in removed:
        # First the manifest: a removal that is cut short must not leave what looks like a checkpoint.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    return removed


def _has_its_files(path: Path) -> bool:
    try:
        verify(path, checksums=False)
    except CheckpointError:
        return False
    return True


def _write(path: Path, known: Standing) -> None:
    write_json(path / STANDING, known.model_dump(mode="json"))
