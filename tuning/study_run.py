"""A study's own run: the MLflow parent of its trials, and the folder that says which of them are done."""

import json
from dataclasses import asdict, dataclass, field
from typing import Self

from pipelines.ending import DESCRIPTION_TAG
from pipelines.home import studies_dir
from pipelines.loading import dump_config
from pipelines.run_folder import (
    RunFolder,
    count_on,
    find_folder,
    study_folders,
)
from pipelines.run_lock import RunLock
from pipelines.tracking_store import TrackingStore
from tuning.parent_run import ParentRun, Progress, make_parent, reopen_parent
from tuning.results import TrialKey
from tuning.study_config import StudyConfig, Tree

_TRIALS = "trials.jsonl"


@dataclass(frozen=True)
class TrialRecord:
    """A trial that is done: a line of the study's ``trials.jsonl``."""

    key: TrialKey
    folder: str
    """Of its run."""
    outcome: str
    seconds: float
    matched: Tree = field(default_factory=dict)
    """Keys of its config that an arm took from another's results."""


def find_study(study: str) -> RunFolder:
    """The folder of the study that a user means by an id, the beginning of one, a name or ``latest``.

    Raises:
        UserError: there is no such study, or there are several.
    """
    return find_folder(study, study_folders(), "study", "studies", studies_dir())


class StudyRun(ParentRun):
    """The run of a study."""

    def __init__(self, config: StudyConfig, store: TrackingStore, folder: RunFolder, lock: RunLock) -> None:
        super().__init__(store, folder, lock, config.question)
        self.config = config
        self.progress = Progress(folder)

    @classmethod
    def start(cls, config: StudyConfig, store: TrackingStore, name: str, experiment: str, digest: str) -> Self:
        """A new study; ``digest`` is that of its trials' configs. UserError if the store refuses."""
        params = {"arms": ", ".join(config.arms), "blocks_at_most": str(config.blocks), "base": ", ".join(config.base)}
        folder, lock = make_parent(
            store,
            studies_dir(),
            count_on(name, {folder.info.name for folder in study_folders()}),
            experiment,
            tags={"role": "study", DESCRIPTION_TAG: config.question},
            params=params,
            files={"config.yaml": dump_config(config), Progress.FILE: Progress.fresh(digest)},
        )
        return cls(config, store, folder, lock)

    @classmethod
    def reopen(cls, config: StudyConfig, store: TrackingStore, folder: RunFolder, digest: str) -> Self:
        """A study that goes on.

        Raises:
            UserError: another process works on it, the store does not know it, or its trials would be others now.
        """
        Progress(folder).refuse_other(digest, f"study {folder.info.name}")
        lock = reopen_parent(store, folder, dump_config(config))
        return cls(config, store, folder, lock)

    @property
    def trials(self) -> list[TrialRecord]:
        """The trials that are done, as they ended."""
        return read_trials(self.folder)

    def record(self, trial: TrialRecord) -> None:
        """A trial is done."""
        add_trial(self.folder, trial)


def add_trial(folder: RunFolder, trial: TrialRecord) -> None:
    """Remember that a trial of a study is done."""
    # A line end before it, too: a kill may have cut the last line short.
    with (folder.path / _TRIALS).open("a", encoding="utf-8") as file:
        file.write(f"\n{json.dumps(asdict(trial))}\n")


def read_trials(folder: RunFolder) -> list[TrialRecord]:
    """The trials of a study that are done, as they ended; a line that a kill cut short is left out."""
    try:
        lines = (folder.path / _TRIALS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    trials = []
    for line in lines:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        trials.append(TrialRecord(**{**content, "key": TrialKey(**content["key"])}))
    return trials
