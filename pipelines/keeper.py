"""The checkpoints of a run while it trains: when they are written, confirmed, condemned and deleted."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moe.state import JSON, is_finite
from moe.trainer import Trainer
from pipelines import checkpoints
from pipelines.checkpoint_manifest import CheckpointError, checkpoint_folders, step_of
from pipelines.checkpoint_standing import (
    condemn,
    mark,
    newer_than,
    newest_valid,
    newest_whole,
    pin,
    prune,
    standing,
)
from pipelines.config import CheckpointConfig
from pipelines.first_rank import from_first_rank
from pipelines.notes import Note, add_note
from pipelines.operations import UNSAVED, record_operation, settle
from pipelines.run_folder import RunFolder
from pipelines.spike_event import Action


@dataclass(frozen=True)
class StartingPoint:
    """A checkpoint, of whatever run, that a run begins with while it has none of its own."""

    checkpoint: Path
    fresh: tuple[str, ...] = ()
    """Beginnings of the names of what is not taken from it (``optimizer.``, ``stability.clip.``): that begins as in a
    new run."""


class CheckpointKeeper:
    """Saves a trainer's state and takes it up again. Every rank has one; rank 0's alone changes what is on the disk.

    ``saved_at`` is the step of the checkpoint that the next resume would find, 0 without one.
    """

    def __init__(
        self, trainer: Trainer, folder: RunFolder, config: CheckpointConfig, metadata: dict[str, JSON]
    ) -> None:
        """``metadata`` goes into every manifest."""
        self._trainer = trainer
        self._folder = folder
        self._config = config
        self._metadata = metadata
        self._timeline = 0
        self._leads = trainer.ranks.rank == 0
        self._unconfirmed: dict[int, Path] = {}
        self._calm_since = 0
        self._last_complaint = ""
        self.saved_at = 0

    def resume(self) -> bool:
        """Take up the newest resumable checkpoint; whether there was one. Collective.

        What is newer than that, being damaged or suspect, is discarded: from here on the run tells another story.

        Raises:
            CheckpointError: it does not fit the config, or became damaged since it was found.
        """
        # Rank 0 looks, so that all ranks take the same.
        path, went_back = from_first_rank(self._trainer.ranks, self._look)
        self._timeline = int(went_back)
        if path is None:
            return False
        self._timeline += self._load(path)["timeline"]
        self.saved_at = self._trainer.steps_done
        if self._leads:
            known = {p: standing(p) for p in checkpoint_folders(self._folder.checkpoints)}
            waiting = [p for p, found in known.items() if found.state == "unconfirmed"]
            self._unconfirmed = {step_of(p): p for p in waiting}
        return True

    def begin_with(self, start: StartingPoint) -> None:
        """Take up the state that the run begins with. Collective.

        Raises:
            CheckpointError: it does not fit the config, or is damaged.
        """
        self._load(start.checkpoint, start.fresh)

    def _load(self, path: Path, fresh: tuple[str, ...] = ()) -> checkpoints.Restored:
        restored = checkpoints.load(path, self._trainer.state(), fresh)
        self._trainer.restore(restored["scalars"])
        if any("optimizer.".startswith(prefix) for prefix in fresh):
            self._trainer.optimizer.reset()  # the count of its updates, too
        return restored

    def restore_before(self, step: int) -> bool:
        """Take up the newest valid checkpoint of at most ``step`` steps; whether there was one. Collective."""
        path = from_first_rank(self._trainer.ranks, lambda: newest_valid(self._folder.checkpoints, step))
        if path is None:
            return False
        self._load(path)
        return True

    def go_back(self, step: int) -> None:
        """Training goes on from the state after ``step`` on a new timeline: discard the checkpoints after it.

        Every rank must call it, before the next step.
        """
        self._timeline += 1
        self._unconfirmed = {saved: path for saved, path in self._unconfirmed.items() if saved <= step}
        earlier = 0
        if self._leads:
            for path in checkpoint_folders(self._folder.checkpoints):
                if step_of(path) > step:
                    self._try(partial(mark, path, "discarded"), "discarded")
                elif standing(path).resumable:
                    earlier = step_of(path)
        self.saved_at = from_first_rank(self._trainer.ranks, lambda: earlier)

    def restart_confirmation(self, step: int) -> None:
        """There was an event at ``step``: what is not confirmed by then waits for as many steps without one again."""
        self._calm_since = step

    def pin(self, step: int, event: str) -> str | None:
        """Keep the newest whole checkpoint of at most ``step`` steps for a replay of the event; its name. On rank 0."""
        path = newest_whole(self._folder.checkpoints, step)
        if path is None or not self._try(partial(pin, path, event), "pinned"):
            return None
        return path.name

    def save(self, *, required: bool) -> None:
        """Save a checkpoint, then delete what is not needed any more. Collective.

        Training goes on without a checkpoint that cannot be written, a full disk for instance: the older ones are as
        they were, and the run says so in its notes. A state that is not finite is not saved.

        Raises:
            CheckpointError: it cannot be written, and is ``required`` because training ends here.
        """
        step = self._trainer.steps_done
        if self.saved_at == step:
            return
        if not is_finite(self._trainer.state(), self._trainer.ranks):
            self._note(f"the state after step {step} is not finite, so it was not saved")
            return
        try:
            path = checkpoints.save(
                self._folder.checkpoints,
                self._trainer.state(),
                step=step,
                metadata=self._metadata,
                timeline=self._timeline,
            )
        except CheckpointError as error:
            if required:
                text = (
                    f"the checkpoint of step {step} could not be written ({error}); the last one is of step "
                    f"{self.saved_at}, and `steadymoe train --resume` goes on from there"
                )
                self._record_failure("abort", text)
                raise CheckpointError(text) from error
            text = f"the checkpoint of step {step} could not be written, training goes on: {error}"
            self._note(text)
            self._record_failure("go_on", text)
            return
        self.saved_at = step
        if self._leads:
            settle(self._folder, UNSAVED, step)
            self._unconfirmed[step] = path
            self._try(partial(prune, self._folder.checkpoints, self._config.keep), "deleted")

    def step_done(self) -> None:
        """After every step: confirm the checkpoints that lie far enough behind."""
        calm = self._trainer.steps_done - self._config.confirm_steps
        due = [step for step in self._unconfirmed if max(step, self._calm_since) <= calm]
        for step in due:
            path = self._unconfirmed[step]
            # What a full disk does not take now is tried again after the next step.
            if not path.exists() or self._try(partial(mark, path, "good"), "confirmed"):
                del self._unconfirmed[step]

    def condemn(self, name: str) -> None:
        """Training ends here for something that is wrong: what is not confirmed yet may be poisoned already."""
        if self._leads:
            self._try(partial(condemn, self._folder.checkpoints, name), "marked as suspect")
            self._unconfirmed.clear()

    def _record_failure(self, action: Action, text: str) -> None:
        """Write down that a checkpoint could not be written; none of the run's makes it good if that ends here."""
        if not self._leads:
            return
        record_operation(self._folder, "checkpoint_failed", action, text)
        if action == "abort":
            settle(self._folder, UNSAVED, self._trainer.steps_done, state="aborted")

    def _look(self) -> tuple[Path | None, bool]:
        """The checkpoint to take up, and whether newer ones were discarded for it."""
        folder = self._folder.checkpoints
        path = newest_valid(folder)
        newer = newer_than(folder, path)
        for passed in newer:
            if (known := standing(passed)).state != "discarded":
                text = (
                    f"checkpoint {passed.name} is {'damaged' if known.resumable else known.state}, and was passed over"
                )
                self._note(text)
                if known.resumable:
                    record_operation(self._folder, "checkpoint_damaged", "use_older_checkpoint", text)
                self._try(partial(mark, passed, "discarded"), "discarded")
        # Discarded ones count, too: the first save deletes them, so while there are any none was made since.
        return path, bool(newer)

    def _try(self, action: Callable[[], object], what: str) -> bool:
        """Bookkeeping on a disk that may be full: what fails is noted, and training goes on. Whether it was done."""
        try:
            action()
        except OSError as error:
            complaint = f"checkpoints could not be {what}: {error}"
            if complaint != self._last_complaint:
                self._note(complaint)
            self._last_complaint = complaint
            return False
        return True

    def _note(self, text: str) -> None:
        if self._leads:
            add_note(self._folder.notes, Note("checkpoint", text))
