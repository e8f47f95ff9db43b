"""The life of a run in MLflow, owned by the driver: made, described, and always ended with what is true.

opening = open_store_in_background(tracking_uri(config.tracking))   # while Ray starts
with Tracker.start(config, opening.result(), dataset=..., preset="tiny") as run:
    ...                                                             # rank 0 appends to run.folder.spool
print(run.undelivered or "")
"""

import getpass
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from pipelines.config import RunConfig
from pipelines.delivery import Drainer
from pipelines.description import Status, describe
from pipelines.environment import environment
from pipelines.errors import UserError
from pipelines.flatten import Scalar, flatten
from pipelines.history import History
from pipelines.home import runs_dir
from pipelines.loading import dump_config
from pipelines.run_folder import RunFolder, RunInfo, free_name, read_json, write_json
from pipelines.tracking_store import TrackingStore, find_tracked_run, first_line, store_errors

if TYPE_CHECKING:
    from mlflow.entities import Run

DESCRIPTION_TAG = "mlflow.note.content"

# MLflow's limits.
_PARAMS_PER_BATCH = 100
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_DIGEST_LENGTH = 36

FINISH_TIMEOUT_S = 15.0
"""How long a run's end waits for a server that does not answer."""

_INTERRUPTED_CODES = {130, 128 + signal.SIGTERM, signal.SIGTERM}
"""Exit codes of a driver that was told to stop; Ray's handler of SIGTERM exits with the bare signal number."""


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


class Tracker:
    """One MLflow run. As a context manager it ends the run on every way out, exceptions and signals included."""

    def __init__(self, config: RunConfig, store: TrackingStore, folder: RunFolder) -> None:
        self.config = config
        self.store = store
        self.folder = folder
        self.info: RunInfo = folder.info
        self.undelivered: str | None = None
        """After the end: what to tell the user if MLflow could not be given everything."""
        self._ending: tuple[Status, str | None] | None = None
        self._drainer = Drainer(store.client, folder)
        self._old_handler: Any = None

    @classmethod
    def start(
        cls,
        config: RunConfig,
        store: TrackingStore,
        *,
        dataset: DatasetInfo,
        preset: str = "run",
        resume: RunFolder | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Self:
        """Make the run and its folder, or take up the run in ``resume``, and record what it is.

        Args:
            config: the whole config; only ``schedule.steps`` and ``tracking`` may differ from a resumed run's.
            store: where the run is recorded.
            dataset: what it reads.
            preset: preset or file that its name is made from, if the config gives none.
            resume: the run that continues.
            tags: further tags of the run, for instance ``role``, which is train otherwise.

        Raises:
            UserError: the store refuses, or does not know the run to resume.
        """
        with store_errors(store.uri):
            folder = _reopen(config, store, resume) if resume else _create(config, store, preset, tags or {})
            tracker = cls(config, store, folder)
            try:
                _record_start(config, store, folder, dataset)
            except BaseException as error:
                tracker._drainer.start()
                tracker._end(*_ending_of(error))
                raise
        return tracker

    def end_as(self, status: Status, reason: str | None = None) -> None:
        """Say how the run ends, where that is not what the exception on the way out says."""
        self._ending = (status, reason)

    def __enter__(self) -> Self:
        self._drainer.start()
        # Without a handler the process would vanish on SIGTERM, and the run would go on for ever. Ray sets its own.
        on_main_thread = threading.current_thread() is threading.main_thread()
        if on_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._old_handler = signal.signal(signal.SIGTERM, _exit_on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(*(self._ending or _ending_of(error)))
        if self._old_handler is not None and signal.getsignal(signal.SIGTERM) is _exit_on_signal:
            signal.signal(signal.SIGTERM, self._old_handler)

    def _end(self, status: Status, reason: str | None) -> None:
        """Write down how the run ended, and let the drainer bring it to MLflow."""
        history = History.read(self.folder.spool)
        tags = {
            "diverged": str(history.diverged).lower(),
            DESCRIPTION_TAG: describe(self.config, history, status, reason),
        }
        if history.first_non_finite:
            steps = (f"{name} from step {step}" for name, step in history.first_non_finite.items())
            tags["non_finite"] = ", ".join(steps)[:_TAG_LENGTH]
        ending = {"status": status, "time_ms": time.time_ns() // 1_000_000, "metrics": history.finals(), "tags": tags}
        write_json(self.folder.ending, ending)
        self.undelivered = self._drainer.finish(FINISH_TIMEOUT_S)


def _create(config: RunConfig, store: TrackingStore, preset: str, tags: Mapping[str, str]) -> RunFolder:
    tracking = config.tracking
    experiment_id = store.experiment_id(tracking.experiment)
    name = free_name(tracking.run_name, Path(preset).name.removesuffix(".yaml"))
    run = store.client.create_run(
        experiment_id,
        run_name=name,
        tags={
            "role": "train",
            "command": shlex.join(sys.argv)[:_TAG_LENGTH],
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": Path(sys.argv[0]).name,
            "mlflow.user": _user(),
            DESCRIPTION_TAG: describe(config, History()),
            **tags,
        },
    )
    folder = RunFolder(runs_dir() / run.info.run_id)
    created = datetime.now(UTC).isoformat(timespec="milliseconds")
    folder.write_info(RunInfo(run.info.run_id, name, tracking.experiment, experiment_id, created, store.uri))
    return folder


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
    folder.write_info(replace(info, tracking_uri=store.uri))
    store.client.update_run(info.id, status="RUNNING", name=info.name)
    store.client.set_tag(info.id, DESCRIPTION_TAG, describe(config, History.read(folder.spool)))
    folder.ending.unlink(missing_ok=True)
    write_json(folder.delivered, {**read_json(folder.delivered), "ended": False})
    return folder


def _record_start(config: RunConfig, store: TrackingStore, folder: RunFolder, dataset: DatasetInfo) -> None:
    """Everything that is known of a run before its first step."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, RunTag

    client, run_id = store.client, folder.info.id
    folder.config.write_text(dump_config(config), encoding="utf-8")
    made_with = environment()
    write_json(folder.environment, made_with)
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


def _ending_of(error: BaseException | None) -> tuple[Status, str | None]:
    """How a run ends that is left with this exception."""
    match error:
        case None | SystemExit(code=None | 0):
            return "FINISHED", None
        case KeyboardInterrupt():
            return "KILLED", "interrupted"
        case SystemExit(code=int(code)) if code in _INTERRUPTED_CODES:
            return "KILLED", "told to stop"
        case _:
            return "FAILED", f"{type(error).__name__}: {first_line(error)}"


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a user id that has no entry.
        return f"uid {os.getuid()}"
