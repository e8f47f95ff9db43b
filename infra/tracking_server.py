"""The MLflow server on the local database: in the background for `steadymoe up`, or in the foreground.

``python -m infra.tracking_server --port 5000`` is what `make ui` runs.
"""

import os
import sys
import urllib.request
import uuid
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from infra.cluster_state import cluster_dir, read_state
from infra.processes import Service, claim_port, start
from pipelines.command_line import EXIT_DONE, run_command
from pipelines.tracking_store import (
    DEFAULT_UI_PORT,
    SERVER_ENVIRONMENT,
    SQLITE,
    check_sqlite,
    local_database,
    server_arguments,
)


class ServerArguments(BaseModel):
    """The MLflow UI of all runs, on this machine only, until Ctrl-C.

    Example:
      python -m infra.tracking_server --port 5001
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    port: int = DEFAULT_UI_PORT
    """Where it listens; 0 takes any free port."""


def start_server(port: int) -> Service:
    """Start the server in the background; the database is made if there is none.

    Raises:
        UserError: it is no database.
    """
    log = cluster_dir() / "mlflow.log"
    return start(_command(port), _environment(), uuid.uuid4().hex, port, log)


def is_ready(server: Service) -> bool:
    """Whether the server answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{server.address}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, HTTPException):
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C; returns the exit code."""
    return run_command(ServerArguments, _serve, argv, "python -m infra.tracking_server")


def _serve(arguments: ServerArguments) -> int:
    running = read_state().server
    if running and running.alive:
        print(f"MLflow UI: {running.address} (steadymoe up started it)")
        return EXIT_DONE
    port = claim_port(arguments.port, "--port")
    command = _command(port)
    print(f"MLflow UI: http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    return os.execve(command[0], command, _environment())


def _command(port: int) -> list[str]:
    check_sqlite(Path(local_database().removeprefix(SQLITE)))
    return [sys.executable, *server_arguments(local_database(), port)]


def _environment() -> dict[str, str]:
    return {**os.environ, **SERVER_ENVIRONMENT}


if __name__ == "__main__":
    sys.exit(main())
