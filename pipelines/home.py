"""Where all state lives: tracking database, artifacts, token shards, runs."""

import os
from pathlib import Path

from pipelines.errors import UserError

HOME_VARIABLE = "STEADYMOE_HOME"


def home() -> Path:
    """The folder that holds all state: ``$STEADYMOE_HOME``, else the project's root.

    Never the working directory: a submitted Ray job runs in a copy of the project that is deleted with the job.
    An installation without a project root (a wheel) uses ``~/.steadymoe``.
    """
    if chosen := os.environ.get(HOME_VARIABLE):
        return Path(chosen).expanduser().absolute()
    root = Path(__file__).parents[1]
    return root if (root / "pyproject.toml").exists() else Path.home() / ".steadymoe"


def refuse_unwritable_home() -> None:
    """Make the folder if it is missing. UserError if there can be none, or nothing can be written to it."""
    try:
        home().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{HOME_VARIABLE}: {home()} cannot be made: {error.strerror}; name another folder") from error
    if not os.access(home(), os.W_OK | os.X_OK):
        raise UserError(f"{HOME_VARIABLE}: {home()} cannot be written to; name another folder")


def corpora_dir() -> Path:
    """Prepared token shards, a folder per corpus and tokenizer."""
    return home() / "corpora"


def runs_dir() -> Path:
    """One folder per run, named by its MLflow run id."""
    return home() / "runs"


def studies_dir() -> Path:
    """One folder per study, named by its MLflow run id."""
    return home() / "studies"


def replays_dir() -> Path:
    """One folder per replay of a spike, named by its MLflow run id."""
    return home() / "replays"


def sweeps_dir() -> Path:
    """One folder per sweep, named by its MLflow run id."""
    return home() / "sweeps"


def comparisons_dir() -> Path:
    """One folder per comparison of runs, named by its MLflow run id."""
    return home() / "comparisons"
