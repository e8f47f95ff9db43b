"""A sweep's own run: the MLflow parent of its trials, and the folder with its journal."""

from typing import Self

from pipelines.ending import DESCRIPTION_TAG
from pipelines.home import sweeps_dir
from pipelines.loading import dump_config
from pipelines.run_folder import RunFolder, count_on, sweep_folders
from pipelines.run_lock import RunLock
from pipelines.tracking_store import TrackingStore
from tuning.parent_run import ParentRun, Progress, make_parent, reopen_parent
from tuning.sweep_config import SweepConfig
from tuning.sweep_journal import SweepJournal

JOURNAL = "trials.jsonl"


class SweepRun(ParentRun):
    """The run of a sweep."""

    def __init__(self, config: SweepConfig, store: TrackingStore, folder: RunFolder, lock: RunLock) -> None:
        super().__init__(store, folder, lock, config.question)
        self.config = config
        self.progress = Progress(folder)
        self.journal = SweepJournal.read(folder.path / JOURNAL)

    @classmethod
    def start(cls, config: SweepConfig, store: TrackingStore, name: str, experiment: str, digest: str) -> Self:
        """A new sweep; ``digest`` is that of its base's config and the text. UserError if the store refuses."""
        params = {
            "space": ", ".join(config.space),
            "searcher": config.searcher.kind,
            "scheduler": config.scheduler.kind,
            "seeds": str(config.seeds),
            "base": ", ".join(config.base),
        }
        folder, lock = make_parent(
            store,
            sweeps_dir(),
            count_on(name, {folder.info.name for folder in sweep_folders()}),
            experiment,
            tags={"role": "sweep", DESCRIPTION_TAG: config.question},
            params=params,
            files={"config.yaml": dump_config(config), Progress.FILE: Progress.fresh(digest)},
        )
        return cls(config, store, folder, lock)

    @classmethod
    def reopen(cls, config: SweepConfig, store: TrackingStore, folder: RunFolder, digest: str) -> Self:
        """A sweep that goes on.

        Raises:
            UserError: another process works on it, the store does not know it, or its trials would be others now.
        """
        Progress(folder).refuse_other(digest, f"sweep {folder.info.name}")
        lock = reopen_parent(store, folder, dump_config(config))
        return cls(config, store, folder, lock)
