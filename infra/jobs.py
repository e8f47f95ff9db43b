"""`steadymoe submit`: a command as a Ray job, watched until it ends; its exit code is the command's."""

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.arguments import SubmitArguments
from infra.cluster_state import ClusterState, Head, client_environment, read_state
from infra.job_package import JobCommand, pack, read_command
from infra.job_watch import watch
from infra.ray_head import JOB_STOP_WAIT_S, STOP_WAIT_VARIABLE
from pipelines.addresses import place_of, silence_at
from pipelines.command_line import EXIT_DONE
from pipelines.errors import UserError
from pipelines.home import home
from pipelines.run_folder import find_run

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_API_VARIABLE, _ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"
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
    address, own = _find_head(arguments.address)
    if own:
        _know(own)
        if job and job.resume is not None:
            find_run(job.resume)
    client = _connect(address)
    if job is None:
        assert arguments.watch is not None
        return watch(client, arguments.watch)
    job_id = _send(client, job, {} if own else _with_time_to_save())
    if arguments.detach:
        print(f"submitted {job_id}; watch it with: steadymoe submit --watch {job_id}")
        return EXIT_DONE
    print(f"submitted {job_id}; Ctrl-C offers to stop it or to leave it alone", flush=True)
    return watch(client, job_id)


def _find_head(asked: str | None) -> tuple[str, Head | None]:
    """Address of the head that is asked for, or of the environment's, or of the one that `up` started; and that one."""
    state = read_state()
    head = state.head if state.head and state.head.alive else None
    address = asked or os.environ.get(_API_VARIABLE) or os.environ.get(_ADDRESS_VARIABLE)
    if head and (not address or place_of(address) in (place_of(head.address), place_of(head.gcs_address))):
        return head.address, head
    if not address:
        raise UserError(f"no Ray head runs for {home()}; {_UP}")
    return address, None


def _know(head: Head) -> None:
    """Let this process reach the head that `up` started."""
    os.environ.update(client_environment(ClusterState(head)))
    # It would win over the token's file.
    os.environ.pop("RAY_AUTH_TOKEN", None)


def _with_time_to_save() -> dict[str, Any]:
    """The runtime environment for a head that may have Ray's own limit: it kills a job 3 s after it was stopped."""
    return {"env_vars": {STOP_WAIT_VARIABLE: os.environ.get(STOP_WAIT_VARIABLE, str(JOB_STOP_WAIT_S))}}


def _connect(address: str) -> "JobSubmissionClient":
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


def _send(client: "JobSubmissionClient", job: JobCommand, environment: dict[str, Any]) -> str:
    print("sending the code ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="steadymoe-job-") as folder:
        pack(job, Path(folder))
        runtime_env = {"working_dir": folder, **environment}
        return str(client.submit_job(entrypoint=job.entrypoint, runtime_env=runtime_env))


def _check_answers(address: str) -> None:
    """Find out in a moment what Ray's client finds out after a minute, for addresses that it connects to."""
    place = place_of(address)
    if place is None:
        raise UserError(f"{address}: should be the address of a Ray dashboard, for example http://127.0.0.1:8265")
    if (why := silence_at(place)) is not None:
        raise UserError(f"{address}: no Ray head answers there ({why}); {_UP}")


def _quiet_loggers() -> None:
    """Ray's job client and its packaging, each with a level of its own, tell of every step."""
    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
