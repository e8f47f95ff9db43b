"""A replay's own run: the MLflow parent of its trials, and the folder that keeps what they begin with."""

import os
import shutil
from pathlib import Path
from typing import Self

from pipelines.checkpoint_manifest import MANIFEST
from pipelines.ending import DESCRIPTION_TAG
from pipelines.errors import UserError
from pipelines.home import replays_dir
from pipelines.loading import dump_config
from pipelines.run_folder import RunFolder, count_on, replay_folders
from pipelines.run_lock import RunLock
from pipelines.tracking_store import TrackingStore
from tuning.parent_run import ParentRun, make_parent
from tuning.replay_plan import Plan


class ReplayRun(ParentRun):
    """The run of a replay."""

    def __init__(self, plan: Plan, store: TrackingStore, folder: RunFolder, lock: RunLock) -> None:
        super().__init__(store, folder, lock, _question(plan))

    @classmethod
    def begin(cls, plan: Plan, store: TrackingStore) -> Self:
        """A new replay. UserError if the store refuses."""
        event, run = plan.event, plan.run.info
        params = {
            "run": run.name,
            "event": event.id,
            "treatments": ", ".join(arm.name for arm in plan.arms),
            "begins_with": plan.start.says,
            "first_step": str(plan.start.step + 1),
            "last_step": str(plan.until),
            "settings": " ".join(plan.settings) or "none",
        }
        folder, lock = make_parent(
            store,
            replays_dir(),
            count_on(f"{event.id}-replay", {folder.info.name for folder in replay_folders()}),
            plan.arms[0].config.tracking.experiment,
            tags={
                "role": "replay",
                "replay.run": run.name,
                "replay.run_id": run.id,
                "replay.event": event.id,
                DESCRIPTION_TAG: _question(plan),
            },
            params=params,
            files={"config.yaml": dump_config(plan.arms[0].config)},
        )
        return cls(plan, store, folder, lock)


def _question(plan: Plan) -> str:
    return f"What would have avoided {plan.event.id} of run {plan.run.info.name}?"


def keep_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint in another folder, where the run that it is of cannot take it away; its new path.

    Its files are linked, and copied where the file system does not allow that.

    Raises:
        UserError: they cannot be read, or there is no room.
    """
    kept = folder / checkpoint.name
    kept.mkdir(parents=True)
    try:
        # The manifest last: without it this is no checkpoint.
        for file in [*sorted(checkpoint.glob("*.safetensors")), checkpoint / MANIFEST]:
            try:
                os.link(file, kept / file.name)
            except OSError:
                shutil.copyfile(file, kept / file.name)
    except OSError as error:
        raise UserError(f"{checkpoint}: cannot be copied to {kept}: {error.strerror}") from error
    return kept
