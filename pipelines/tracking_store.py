"""The MLflow tracking store of a run: which one it is, how it is reached, and where people look at it."""

import os
import re
import sqlite3
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from pipelines.config import TrackingConfig
from pipelines.errors import UserError, first_line
from pipelines.home import home
from pipelines.run_folder import RunInfo

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from pipelines.saved_view import View

URI_VARIABLE = "MLFLOW_TRACKING_URI"
DEFAULT_UI_PORT = 5000
UI_ADDRESS = f"http://127.0.0.1:{DEFAULT_UI_PORT}"
"""Where the server that a user starts on a local database listens, unless told otherwise."""

# The server's job runner is not needed, and takes 1.4 GB.
SERVER_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
"""Environment variables of such a server."""

SQLITE = "sqlite:///"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")

# MLflow would try 7 times with growing pauses, about 4 minutes in all, before it says that a server is down; and a
# timeout of 2 s is too short for a cold server's first answer. What the user has set stays.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # It would print links of its own when a run ends, with the password that the URI may hold.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The log's INFO lines name every schema migration of a new database.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


@dataclass(frozen=True)
class TrackingStore:
    """An open tracking store."""

    client: "MlflowClient"
    uri: str

    def experiment_id(self, name: str) -> str:
        """The id of an experiment, which is made if there is none.

        Raises:
            UserError: it is deleted, or it cannot be written to from here.
        """
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name, artifact_location=_artifact_root(self.uri)))
            except MlflowException as error:
                # Another run of this moment was faster.
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self.client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            raise UserError(
                f"tracking.experiment: {name!r} is deleted in {shown(self.uri)}; restore it or choose another name"
            )
        if is_database(self.uri) and str(found.artifact_location).startswith("mlflow-artifacts:"):
            raise UserError(
                f"tracking.experiment: {name!r} was made through a server, which alone can store its artifacts; "
                "set tracking.uri to the server's address, or choose another name"
            )
        return str(found.experiment_id)


def tracking_uri(tracking: TrackingConfig, resumed: RunInfo | None = None) -> str:
    """The URI that holds: the config's, the resumed run's, the environment's, or else the local database.

    A resumed run knows its URI without the password; the environment's is taken if that is all they differ in.
    """
    given = os.environ.get(URI_VARIABLE)
    if resumed and tracking.uri is None:
        uri = given if given and shown(_absolute(given)) == resumed.tracking_uri else resumed.tracking_uri
    else:
        uri = tracking.uri or given or local_database()
    return _absolute(uri)


def _absolute(uri: str) -> str:
    # A run is resumed and delivered from other working directories, too.
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}" if uri.startswith(SQLITE) else uri


def local_database() -> str:
    """The database that needs no server."""
    return f"{SQLITE}{home() / 'mlflow.db'}"


def open_store(uri: str) -> TrackingStore:
    """Import MLflow and open the store; a new database gets its tables.

    Takes 1 to 2 s, and about 2 s more the first time on a database.

    Raises:
        UserError: there is no store at ``uri``, or it does not answer.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if uri.startswith(SQLITE):
        check_sqlite(Path(uri.removeprefix(SQLITE)))
    from mlflow import MlflowClient

    with store_errors(uri):
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return TrackingStore(client, uri)


def open_store_in_background(uri: str) -> "Future[TrackingStore]":
    """`open_store` in a thread, for a driver that starts Ray meanwhile; ``result()`` raises what it would have."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
    opening = thread.submit(open_store, uri)
    thread.shutdown(wait=False)
    return opening


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn what a tracking store answers before training starts into the user's error that it is."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        where = f"MLflow at {shown(uri)}"
        if uri.startswith("http") and "Max retries exceeded" in str(error):
            # The key may have come from the variable, or from the server that a resumed run was made with.
            key = URI_VARIABLE if os.environ.get(URI_VARIABLE) == uri else "tracking.uri"
            raise UserError(
                f"{key}: {where} does not answer; start it (the one of steadymoe up with that command), "
                f"or take the local database, which that one serves: tracking.uri={local_database()}"
            ) from error
        raise UserError(f"tracking.uri: {where}: {first_line(error)}") from error


def shown(uri: str) -> str:
    """A URI for people, logs and files: without its password, and for a server without user name (or token), too."""
    # Greedy up to the last @ before the path: a password may hold one.
    return re.sub(r"//[^/]*@", "//", uri) if uri.startswith("http") else re.sub(r"(//[^:@/]*):[^/]*@", r"\1@", uri)


def is_database(uri: str) -> bool:
    """Whether the store is a database that this process opens itself, rather than a server."""
    return uri.startswith(_DATABASES)


def view_link(uri: str, experiment_id: str, view: "View") -> str:
    """Where the UI shows the charts of an experiment's runs as a saved view has them."""
    return _address(uri) + view.link(experiment_id)


def run_link(uri: str, experiment_id: str, run_id: str) -> str:
    """Where the UI shows a run by itself. Without the workflow type it would show it as one of generative AI."""
    return f"{_address(uri)}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def artifact_link(uri: str, experiment_id: str, run_id: str, path: str) -> str:
    """Where the UI shows a file of a run."""
    return f"{_address(uri)}/#/experiments/{experiment_id}/runs/{run_id}/artifacts/{path}?workflowType=machine_learning"


def server_command(uri: str) -> str | None:
    """The command that shows a database in the UI, from any folder and any shell; None for a server."""
    if not is_database(uri):
        return None
    if uri == local_database() and (home() / "Makefile").exists():
        return f"make -C {quote(str(home()))} ui"
    settings = " ".join(f"{name}={value}" for name, value in SERVER_ENVIRONMENT.items())
    command = [sys.executable, *server_arguments(shown(uri), DEFAULT_UI_PORT)]
    return f"{settings} {' '.join(map(quote, command))}"


def server_arguments(uri: str, port: int) -> list[str]:
    """What Python runs to serve a database and its UI on the loopback interface alone.

    New experiments keep their artifacts as files, as those do that a database made without a server. So both ways lead
    to the same experiments; artifacts of experiments that some other server made are still served.
    """
    return [
        *("-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", uri, "--default-artifact-root", artifacts_dir().as_uri()),
        *("--artifacts-destination", str(artifacts_dir())),
    ]


def artifacts_dir() -> Path:
    """Artifacts of runs that a database tracks."""
    return home() / "mlartifacts"


def find_tracked_run(store: TrackingStore, info: RunInfo) -> "Run":
    """What MLflow has of a run.

    Raises:
        UserError: the store has no such run, or it is deleted there.
    """
    from mlflow.exceptions import MlflowException

    missing = f"tracking.uri: run {info.name} ({info.id}) is not in {shown(store.uri)}"
    try:
        run = store.client.get_run(info.id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(f"{missing}; it was tracked in {info.tracking_uri}") from error
    if run.info.lifecycle_stage != "active":
        raise UserError(f"{missing} any more: it was deleted there, and can be restored")
    return run


def _address(uri: str) -> str:
    return UI_ADDRESS if is_database(uri) else shown(uri).rstrip("/")


def _artifact_root(uri: str) -> str | None:
    return artifacts_dir().as_uri() if is_database(uri) else None


def check_sqlite(path: Path) -> None:
    """Find out in a moment what MLflow finds out after 10 attempts in 100 s.

    Raises:
        UserError: no SQLite database can be there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA schema_version")
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"tracking.uri: {path} cannot be opened as an SQLite database: {error}") from error
