"""The life of a run in MLflow, owned by the driver: made, described, and always ended with what is true.

opening = open_store_in_background(tracking_uri(config.tracking))   # while Ray starts
with Tracker.start(config, opening.result(), dataset=..., preset="tiny") as run:
    ...                                                             # rank 0 appends to run.folder.spool
print(run.undelivered or "")
"""

import getpass
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pipelines.config import RunConfig
from pipelines.delivery import Drainer
from pipelines.description import Status, describe
from pipelines.ending import DESCRIPTION_TAG, ending_of
from pipelines.environment import environment
from pipelines.errors import UserError, first_line
from pipelines.flatten import Scalar, flatten
from pipelines.history import History
from pipelines.home import runs_dir
from pipelines.loading import dump_config
from pipelines.response_config import LadderResponseConfig
from pipelines.run_folder import RunFolder, RunInfo, free_name, read_json, run_folders, write_json, write_whole
from pipelines.run_lock import RunBusyError, RunLock, writer_lock
from pipelines.spool import span_ms
from pipelines.tracking_store import TrackingStore, find_tracked_run, shown, store_errors
from pipelines.views import run_colour

if TYPE_CHECKING:
    from mlflow.entities import Run

# MLflow's limits.
_PARAMS_PER_BATCH = 100
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_DIGEST_LENGTH = 36

FINISH_TIMEOUT_S = 15.0
"""How long a run's end waits for a server that does not answer."""
LAST_WORDS_S = 10.0
"""How long it waits for a training worker that still writes."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetInfo:
    """The text that a run reads."""

    name: str
    digest: str
    """Hexadecimal digest of the content."""
    source: str
    """Path or URI of the token shards."""
    profile: Mapping[str, Scalar]
    """Counts that tell how large it is: documents, tokens, bytes."""


@dataclass(frozen=True)
class TrialPlace:
    """Where a trial stands, which its worker knows before MLflow knows the trial."""

    folder: RunFolder
    parent: str
    """MLflow's id of the run of the study, the sweep or the replay."""


class Tracker:
    """One MLflow run. As a context manager it ends the run on every way out, exceptions included.

    Signals are the caller's to turn into exceptions: `pipelines.interrupts`.
    """

    def __init__(self, config: RunConfig, store: TrackingStore, folder: RunFolder, lock: RunLock) -> None:
        self.config = config
        self.store = store
        self.folder = folder
        self.info: RunInfo = folder.info
        self.undelivered: str | None = None
        """After the end: what to tell the user if MLflow could not be given everything."""
        self.figures: dict[str, float] = {}
        """Further figures of the run's end, finite: metrics at step 0."""
        self.tags: dict[str, str] = {}
        """Further tags of the run's end."""
        self._ending: tuple[Status, str | None] | None = None
        self._ended_ms: int | None = None
        response = config.response
        lag = response.window_steps if isinstance(response, LadderResponseConfig) else 0
        self._drainer = Drainer(store.client, folder, lock, lag_steps=lag)

    @classmethod
    def start(
        cls,
        config: RunConfig,
        store: TrackingStore,
        *,
        dataset: DatasetInfo,
        preset: str = "run",
        resume: RunFolder | None = None,
        trial: TrialPlace | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Self:
        """Make the run and its folder, or take up the run in ``resume``, and record what it is.

        Args:
            config: the whole config; only ``schedule.steps`` and ``tracking`` may differ from a resumed run's.
            store: where the run is recorded.
            dataset: what it reads.
            preset: preset or file that its name is made from, if the config gives none.
            resume: the run that continues.
            trial: where the run stands, if it is a trial of a study.
            tags: further tags of the run, for instance ``role``, which is train otherwise.

        Raises:
            UserError: the store refuses, or does not know the run to resume, or another process works on that.
        """
        with store_errors(store.uri):
            if resume:
                lock = RunLock(resume)
                try:
                    folder = _reopen(config, store, resume)
                    _replace_tags(store, folder, tags or {})
                except BaseException:
                    # Whoever keeps the exception would keep the lock, and nobody could try again.
                    lock.release()
                    raise
            else:
                folder, lock = _create(config, store, preset, trial, tags or {})
            tracker = cls(config, store, folder, lock)
            try:
                _record_start(config, store, folder, dataset)
            except BaseException as error:
                tracker._drainer.start()
                tracker._end(*_how_it_ends(error))
                raise
        return tracker

    def end_as(self, status: Status, reason: str | None = None, time_ms: int | None = None) -> None:
        """Say how the run ends, where that is not what the exception on the way out says, and when, where not now."""
        self._ending, self._ended_ms = (status, reason), time_ms

    def __enter__(self) -> Self:
        self._drainer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(*(self._ending or _how_it_ends(error)))

    def _end(self, status: Status, reason: str | None) -> None:
        """Write down how the run ended, and let the drainer bring it to MLflow."""
        try:
            with writer_lock(self.folder, LAST_WORDS_S):
                pass
        except RunBusyError as error:
            _log.warning("%s; what it writes from now on is not delivered", error)
        ending = ending_of(self.folder, self.config, status, reason, self._ended_ms)
        ending["metrics"] |= self.figures
        ending["tags"] |= self.tags
        try:
            write_json(self.folder.ending, ending)
        except OSError as error:
            _log.warning("%s cannot be written: %s", self.folder.ending, error)
        self.undelivered = self._drainer.finish(FINISH_TIMEOUT_S, ending)


def _create(
    config: RunConfig, store: TrackingStore, preset: str, trial: TrialPlace | None, tags: Mapping[str, str]
) -> tuple[RunFolder, RunLock]:
    """A new run and its folder, locked before anybody else can find it."""
    tracking = config.tracking
    experiment_id = store.experiment_id(tracking.experiment)
    name = free_name(tracking.run_name, Path(preset).name.removesuffix(".yaml"))
    # A trial may have trained while the store was away.
    span = span_ms(trial.folder.spool) if trial is not None else None
    started_ms = span[0] if span is not None else time.time_ns() // 1_000_000
    if trial is not None:
        tags = {"mlflow.parentRunId": trial.parent, **tags}
    run = store.client.create_run(
        experiment_id,
        start_time=started_ms,
        run_name=name,
        tags={
            "role": "train",
            "command": shlex.join(sys.argv)[:_TAG_LENGTH],
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": Path(sys.argv[0]).name,
            "mlflow.user": _user(),
            "mlflow.runColor": run_colour(sum(1 for _ in run_folders())),
            DESCRIPTION_TAG: describe(config, History()),
            **tags,
        },
    )
    folder = trial.folder if trial is not None else RunFolder(runs_dir() / run.info.run_id)
    created = datetime.fromtimestamp(started_ms / 1000, UTC).isoformat(timespec="milliseconds")
    parent = trial.parent if trial is not None else None
    info = RunInfo(run.info.run_id, name, tracking.experiment, experiment_id, created, shown(store.uri), parent)
    try:
        write_whole(folder.config, dump_config(config))
        lock = RunLock(folder)
        folder.write_info(info)
    except BaseException:
        # Without a folder nobody would meet the run again to end it.
        store.client.set_terminated(info.id, "FAILED")
        raise
    return folder, lock


def _reopen(config: RunConfig, store: TrackingStore, folder: RunFolder) -> RunFolder:
    info = folder.info
    if config.tracking.experiment != info.experiment:
        raise UserError(
            f"tracking.experiment: a run stays in its experiment, and {info.name} is in {info.experiment!r}"
        )
    first_wish = find_tracked_run(store, info).data.params.get("tracking.run_name")
    wish = config.tracking.run_name
    if wish and wish not in (first_wish, info.name):
        info = replace(info, name=free_name(wish, wish))
    folder.write_info(replace(info, tracking_uri=shown(store.uri)))
    # In this order: a driver that vanishes in between leaves an ending that is sent again.
    write_json(folder.delivered, {**read_json(folder.delivered), "ended": False})
    store.client.update_run(info.id, status="RUNNING", name=info.name)
    store.client.set_tag(info.id, DESCRIPTION_TAG, describe(config, History.read(folder.spool)))
    write_whole(folder.config, dump_config(config))
    folder.ending.unlink(missing_ok=True)
    return folder


def _replace_tags(store: TrackingStore, folder: RunFolder, tags: Mapping[str, str]) -> None:
    for name, value in tags.items():
        store.client.set_tag(folder.info.id, name, value)


def _record_start(config: RunConfig, store: TrackingStore, folder: RunFolder, dataset: DatasetInfo) -> None:
    """Everything that is known of a run before its first step."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, RunTag

    client, run_id = store.client, folder.info.id
    made_with = environment()
    write_json(folder.environment, made_with)
    write_json(folder.dataset, {"name": dataset.name, "digest": dataset.digest})
    for file in (folder.config, folder.environment):
        client.log_artifact(run_id, str(file))
    log_params(store, client.get_run(run_id), flatten(config))
    git = made_with["git"] or {}
    tags = [RunTag(f"mlflow.source.git.{key}", str(value)) for key, value in git.items()]
    client.log_batch(run_id, tags=tags, synchronous=True)
    entry = Dataset(
        name=dataset.name,
        digest=dataset.digest[:_DIGEST_LENGTH],
        source_type="local",
        source=json.dumps({"uri": dataset.source}),
        profile=json.dumps({**dataset.profile, "digest": dataset.digest}),
    )
    client.log_inputs(run_id, datasets=[DatasetInput(entry, [InputTag("mlflow.data.context", "training")])])


def log_params(store: TrackingStore, run: "Run", values: Mapping[str, Scalar]) -> None:
    """Record the config. MLflow never changes a parameter: what a resumed run has changed is a tag ``resumed.KEY``."""
    from mlflow.entities import Param, RunTag

    known = run.data.params
    texts = {name: _text(value) for name, value in values.items()}
    new = [Param(name, text) for name, text in texts.items() if name not in known]
    changed = [RunTag(f"resumed.{name}", text) for name, text in texts.items() if known.get(name, text) != text]
    for start in range(0, len(new), _PARAMS_PER_BATCH):
        store.client.log_batch(run.info.run_id, params=new[start : start + _PARAMS_PER_BATCH], synchronous=True)
    if changed:
        store.client.log_batch(run.info.run_id, tags=changed, synchronous=True)


def _text(value: Scalar) -> str:
    """A parameter as YAML would show it, within MLflow's limit."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _PARAM_LENGTH else f"{text[: _PARAM_LENGTH - 1]}…"


def _how_it_ends(error: BaseException | None) -> tuple[Status, str | None]:
    """How a run ends that is left with this exception."""
    match error:
        case None | SystemExit(code=None | 0):
            return "FINISHED", None
        case KeyboardInterrupt():
            return "KILLED", "interrupted"
        case _:
            return "FAILED", f"{type(error).__name__}: {first_line(error)}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a user id that has no entry.
        return f"uid {os.getuid()}"
