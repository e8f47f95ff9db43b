"""`steadymoe submit`: a command as a Ray job, watched until it ends; its exit code is the command's."""

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from infra.arguments import SubmitArguments
from infra.cluster_state import ClusterState, client_environment, read_state
from infra.job_package import JobCommand, pack, read_command
from infra.job_watch import watch
from pipelines.command_line import EXIT_DONE
from pipelines.errors import UserError
from pipelines.home import home
from pipelines.run_folder import find_run

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_API_VARIABLE, _ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"
_CONNECT_TIMEOUT_S = 5
_UP = "start one with: steadymoe up"


def submit(arguments: SubmitArguments, command: Sequence[str]) -> int:
    """Submit a command, or take up watching one; returns its exit code, 0 with ``--detach``.

    Raises:
        UserError: the command is wrong or cannot be a job, or no head answers.
    """
    if arguments.watch and command:
        raise UserError("--watch shows a job that was submitted before; leave out the command")
    # What the user typed is checked first, and here: it costs no job, and a second.
    job = None if arguments.watch else read_command(command)
    client = _connect(arguments.address, job)
    if job is None:
        assert arguments.watch is not None
        return watch(client, arguments.watch)
    job_id = _send(client, job)
    if arguments.detach:
        print(f"submitted {job_id}; watch it with: steadymoe submit --watch {job_id}")
        return EXIT_DONE
    print(f"submitted {job_id}; Ctrl-C offers to stop it or to leave it alone", flush=True)
    return watch(client, job_id)


def _connect(asked: str | None, job: JobCommand | None) -> "JobSubmissionClient":
    """A client of the head that is asked for, or of the environment's, or of the one that `up` started."""
    state = read_state()
    head = state.head if state.head and state.head.alive else None
    address = asked or os.environ.get(_API_VARIABLE) or os.environ.get(_ADDRESS_VARIABLE)
    if address is None:
        if head is None:
            raise UserError(f"no Ray head runs for {home()}; {_UP}")
        address = head.address
    if head and _place(address) in (_place(head.address), _place(head.gcs_address)):
        address = head.address
        os.environ.update(client_environment(ClusterState(head)))
        # It would win over the token's file.
        os.environ.pop("RAY_AUTH_TOKEN", None)
        if job and job.resume:
            find_run(job.resume)
    _check_answers(address)
    # Ray's client takes what stands here before its argument.
    os.environ[_API_VARIABLE] = address
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    _quiet_loggers()
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"{address}: refuses the token; RAY_AUTH_TOKEN_PATH names the file with the right one"
        ) from error
    except (ConnectionError, RuntimeError, OSError) as error:
        raise UserError(f"{address}: no Ray dashboard answers there; {_UP}") from error


def _send(client: "JobSubmissionClient", job: JobCommand) -> str:
    with _progress_to_stderr("sending the code ..."), tempfile.TemporaryDirectory(prefix="steadymoe-job-") as folder:
        pack(job, Path(folder))
        return str(client.submit_job(entrypoint=job.entrypoint, runtime_env={"working_dir": folder}))


@contextmanager
def _progress_to_stderr(text: str) -> Iterator[None]:
    print(text, file=sys.stderr, flush=True)
    yield


def _check_answers(address: str) -> None:
    """Find out in a moment what Ray's client finds out after a minute, for addresses that it connects to."""
    place = _place(address)
    if place is None:
        raise UserError(f"{address}: should be the address of a Ray dashboard, for example http://127.0.0.1:8265")
    try:
        with socket.create_connection(place, timeout=_CONNECT_TIMEOUT_S):
            pass
    except OSError as error:
        raise UserError(f"{address}: no Ray head answers there ({error.strerror or error}); {_UP}") from None


def _place(address: str) -> tuple[str, int] | None:
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname and port else None


def _quiet_loggers() -> None:
    """Ray's job client and its packaging, each with a level of its own, tell of every step."""
    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
