"""A run's folder under STEADYMOE_HOME, and how a user names a run."""

import difflib
import json
import uuid
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.home import comparisons_dir, replays_dir, runs_dir, studies_dir, sweeps_dir

LATEST = "latest"
_LISTED = 10


@dataclass(frozen=True)
class RunInfo:
    """What a run is called and where it is tracked; ``run.json`` in its folder."""

    id: str
    """MLflow's id of the run."""
    name: str
    experiment: str
    experiment_id: str
    created: str
    """ISO 8601, with time zone."""
    tracking_uri: str
    """Without a password."""
    parent: str | None = None
    """MLflow's id of the study, the sweep or the replay whose trial this run is."""


@dataclass(frozen=True)
class RunFolder:
    """Where the files of one run are."""

    path: Path

    @property
    def spool(self) -> Path:
        """Metrics as training records them: `pipelines.spool`."""
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> Path:
        """The whole config as YAML."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Machine, versions and code that the run was made with, as JSON."""
        return self.path / "environment.json"

    @property
    def dataset(self) -> Path:
        """Name and digest of the text that the run reads, as JSON."""
        return self.path / "dataset.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the saved states of training: `pipelines.checkpoints`."""
        return self.path / "checkpoints"

    @property
    def notes(self) -> Path:
        """What happened beside the steps: `pipelines.notes`."""
        return self.path / "notes.jsonl"

    @property
    def events(self) -> Path:
        """What went wrong, and what was done about it: `pipelines.spike_event`."""
        return self.path / "events.jsonl"

    @property
    def journal(self) -> Path:
        """What has been done about spikes and is never taken back: `pipelines.journal`."""
        return self.path / "journal.json"

    @property
    def faults(self) -> Path:
        """Which of the faults of the config have happened and must not happen again, as JSON: `pipelines.faults`."""
        return self.path / "faults.json"

    @property
    def cut_off(self) -> Path:
        """Until when nothing is to be delivered, as JSON, while an outage is rehearsed: `pipelines.rehearsal`."""
        return self.path / "cut_off.json"

    @property
    def lock(self) -> Path:
        """Locked by the process that works on the run: `pipelines.run_lock`."""
        return self.path / "lock"

    @property
    def writer_lock(self) -> Path:
        """Locked by the training worker that writes here: `pipelines.run_lock`."""
        return self.path / "writer.lock"

    @property
    def stop(self) -> Path:
        """A file that asks training to stop at the next step while it is there."""
        return self.path / "stop"

    @property
    def figures(self) -> Path:
        """Folder of the run's pictures."""
        return self.path / "figures"

    @property
    def tokens(self) -> Path:
        """Figures of every validation token, if ``validation.per_token``: `pipelines.token_table`."""
        return self.path / "tokens.npz"

    @property
    def ending(self) -> Path:
        """How the run ended, as JSON; there is none while it runs."""
        return self.path / "end.json"

    @property
    def delivered(self) -> Path:
        """How much of the spool and of the ending MLflow has, as JSON."""
        return self.path / "delivered.json"

    @property
    def is_delivered(self) -> bool:
        """Whether the run has ended and MLflow knows it."""
        return self.ending.exists() and bool(read_json(self.delivered).get("ended", False))

    @property
    def registered(self) -> Path:
        """Which checkpoints MLflow knows, as JSON: `pipelines.registration`."""
        return self.path / "registered.json"

    @property
    def traced(self) -> Path:
        """Which events MLflow knows, as JSON: `pipelines.spike_tracking`."""
        return self.path / "traced.json"

    @property
    def init_from(self) -> Path | None:
        """Folder of the weights that the run started from; None if it started from random ones."""
        folder = read_json(self._init_from_file).get("folder")
        return Path(folder) if folder is not None else None

    @property
    def _init_from_file(self) -> Path:
        return self.path / "init_from.json"

    def write_init_from(self, weights: Path) -> None:
        """Write ``init_from.json``: a run that is resumed before its first checkpoint starts from there again."""
        write_json(self._init_from_file, {"folder": str(weights)})

    @property
    def info(self) -> RunInfo:
        """What the run is called and where it is tracked. UserError if its file is damaged."""
        try:
            return RunInfo(**read_json(self._info_file))
        except (ValueError, TypeError) as error:
            raise UserError(f"{self._info_file} is damaged ({error}); mend it, or move its folder away") from error

    @property
    def _info_file(self) -> Path:
        return self.path / "run.json"

    @property
    def is_run(self) -> bool:
        """Whether MLflow knows a run of this folder."""
        return self._info_file.exists()

    def write_info(self, info: RunInfo) -> None:
        """Write ``run.json``; from then on the folder is a run."""
        write_json(self._info_file, asdict(info))


def read_json(path: Path) -> dict[str, Any]:
    """The mapping that a JSON file holds; empty if there is no such file."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is either old or new at any moment, never half written."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is either old or new at any moment, never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: threads of one process may write the same file.
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def run_folders() -> Iterator[RunFolder]:
    """All runs, in no particular order."""
    for info in runs_dir().glob("*/run.json"):
        yield RunFolder(info.parent)


def study_folders() -> Iterator[RunFolder]:
    """All studies, in no particular order. A study is a run that trains nothing itself: the parent of its trials."""
    for info in studies_dir().glob("*/run.json"):
        yield RunFolder(info.parent)


def sweep_folders() -> Iterator[RunFolder]:
    """All sweeps, in no particular order; each is the parent of its trials, like a study."""
    for info in sweeps_dir().glob("*/run.json"):
        yield RunFolder(info.parent)


def unknown_trials(sweep: RunFolder) -> int:
    """Trials of a sweep that have trained, and are no runs: MLflow was away when they began."""
    found = [RunFolder(path) for path in runs_dir().glob(f"{sweep.info.id}-*")]
    return sum(folder.spool.exists() and not folder.is_run for folder in found)


def replay_folders() -> Iterator[RunFolder]:
    """All replays of spikes, in no particular order; each is the parent of its trials, like a study."""
    for info in replays_dir().glob("*/run.json"):
        yield RunFolder(info.parent)


def comparison_folders() -> Iterator[RunFolder]:
    """All comparisons of runs, in no particular order; each is a run that trains nothing itself."""
    for info in comparisons_dir().glob("*/run.json"):
        yield RunFolder(info.parent)


def parent_folders() -> list[RunFolder]:
    """All runs that train nothing themselves: studies, sweeps, replays and comparisons."""
    return [*study_folders(), *sweep_folders(), *replay_folders(), *comparison_folders()]


def find_run(run: str) -> RunFolder:
    """The folder of the run that a user means by an id, the beginning of an id, a name, or ``latest``.

    ``latest`` is the last run that somebody started: a study leaves hundreds of trials.

    Raises:
        UserError: there is no such run, or there are several.
    """
    return find_folder(run, run_folders(), "run", "runs", runs_dir())


def find_sweep(sweep: str) -> RunFolder:
    """The folder of the sweep that a user means, as with `find_run`.

    Raises:
        UserError: there is no such sweep, or there are several.
    """
    return find_folder(sweep, sweep_folders(), "sweep", "sweeps", sweeps_dir())


def find_folder(wanted: str, folders: Iterable[RunFolder], kind: str, kinds: str, place: Path) -> RunFolder:
    """The one of ``folders`` that a user means by an id, the beginning of an id, a name, or ``latest``.

    Args:
        wanted: what the user wrote.
        folders: runs, or whatever else is kept in such folders.
        kind: what one of them is called, for messages.
        kinds: what several are called.
        place: where they are.

    Raises:
        UserError: there is no such folder, or there are several.
    """
    found = {folder.info.id: (folder, folder.info) for folder in folders}
    if not found:
        raise UserError(f"{kind} {wanted}: there are no {kinds} in {place} yet")
    if wanted in found:
        return found[wanted][0]
    if wanted == LATEST:
        started = [both for both in found.values() if both[1].parent is None] or list(found.values())
        return max(started, key=lambda both: (both[1].created, both[1].name))[0]
    named = [both for both in found.values() if both[1].name == wanted]
    matches = named or [both for id_, both in found.items() if wanted and id_.startswith(wanted)]
    if len(matches) == 1:
        return matches[0][0]
    if matches:
        ids = ", ".join(sorted(f"{info.id} ({info.name})" for _, info in matches))
        raise UserError(f"{kind} {wanted}: several {kinds} are meant; name one by its id: {ids}")
    names = sorted({info.name for _, info in found.values()})
    near = difflib.get_close_matches(wanted, [LATEST, *names, *found], n=3)
    newest = ", ".join(_newest(info for _, info in found.values()))
    hint = f"did you mean {' or '.join(near)}?" if near else f"the newest {kinds} are {newest}"
    raise UserError(f"{kind} {wanted}: no {kind} has this id or name; {hint}")


def _newest(infos: Iterable[RunInfo]) -> list[str]:
    newest_first = sorted(infos, key=lambda info: info.created, reverse=True)
    return [info.name for info in newest_first[:_LISTED]]


def free_name(wanted: str | None, preset: str) -> str:
    """A name that no other run has: the wanted one, counted on if it is taken, or the preset's name and a number.

    The telling part stands first, because the charts of MLflow's UI cut names at about 14 characters.
    """
    taken = {folder.info.name for folder in run_folders()}
    if wanted and wanted not in taken:
        return wanted
    return count_on(wanted or preset, taken, 2 if wanted else 1)


def count_on(base: str, taken: Container[str], number: int = 1) -> str:
    """``base`` with the first number, from ``number``, that makes it none of ``taken``."""
    while f"{base}-{number}" in taken:
        number += 1
    return f"{base}-{number}"
