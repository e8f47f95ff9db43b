"""The local cluster of a STEADYMOE_HOME: a Ray head and an MLflow server, started, shown and ended."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from shlex import quote
from typing import TypeVar

from infra.arguments import UpArguments
from infra.cluster_state import (
    ClusterState,
    Head,
    client_environment,
    cluster_dir,
    locked,
    read_state,
    token_file,
    write_state,
)
from infra.dashboard import Dashboard, DashboardError, Driver, Job
from infra.processes import Service, claim_port, end, last_line
from infra.ray_head import keep_logs, start_head
from infra.stopping import stop_work
from infra.tracking_server import is_ready as server_is_ready
from infra.tracking_server import start_server
from pipelines.errors import UserError
from pipelines.home import home, refuse_unwritable_home
from pipelines.progress import clock

# A head took 6 s and a server 5 s on two idle cores, several times that on busy ones.
_START_TIMEOUT_S = 180
_POLL_S = 0.2
_STILL_EVERY_S = 10.0
_JOBS_SHOWN = 20

Say = Callable[[str], None]
AnyService = TypeVar("AnyService", bound=Service)


def up(arguments: UpArguments) -> None:
    """Start what does not run yet, and say how to use it.

    Raises:
        UserError: a port is taken, what runs does so on another port, something did not start, or STEADYMOE_HOME
            cannot be written to.
    """
    refuse_unwritable_home()
    # With --exports the output is for the shell; progress goes where people still see it.
    say = _to_stderr if arguments.exports else _to_stdout
    with locked():
        state = _start_missing(arguments, read_state(), say)
    lines = [f"export {name}={quote(value)}" for name, value in client_environment(state).items()]
    if arguments.exports:
        print("\n".join([*lines, "unset RAY_AUTH_TOKEN"]))
        return
    assert state.head is not None
    assert state.server is not None
    say(
        f"\nRay     {state.head.address}  (asks for the token in {token_file()})"
        f"\nMLflow  {state.server.address}"
        f"\nlogs    {cluster_dir()}"
        "\n\nTrain on it with: steadymoe submit -- train tiny"
        '\nRay\'s own client needs these lines, which a shell takes by: eval "$(steadymoe up --exports)"'
    )
    say("\n".join(f"  {line}" for line in lines))


def status() -> None:
    """Say what runs and which jobs there are."""
    state = read_state()
    if not state.head and not state.server:
        print(f"Nothing runs for {home()}. Start Ray and MLflow with: steadymoe up")
        return
    for name, service in (("Ray", state.head), ("MLflow", state.server)):
        print(_standing(name, service))
    if state.head and state.head.alive:
        dashboard = _dashboard(state.head)
        try:
            jobs, drivers, cpus = dashboard.jobs(), dashboard.drivers(), dashboard.cpus()
        except DashboardError as error:
            print(f"The Ray head does not answer ({error}); its log is {state.head.log}")
            return
        if cpus:
            print(f"CPUs    {cpus[0]:g} of {cpus[1]:g} in use by jobs")
        _print_jobs(jobs)
        _print_drivers(drivers)


def down() -> None:
    """Stop the jobs, which save first, then end the head and the server. Ends nothing that `up` did not start.

    Raises:
        UserError: processes that are no jobs work on the head.
    """
    if not cluster_dir().is_dir():
        print(f"Nothing runs for {home()}.")
        return
    with locked():
        state = read_state()
        if not state.head and not state.server:
            print(f"Nothing runs for {home()}.")
            return
        if state.head:
            if state.head.alive:
                stop_work(state.head, _dashboard(state.head))
            _end("Ray head", state.head)
            keep_logs(state.head)
            state = replace(state, head=None)
            write_state(state)
        if state.server:
            _end("MLflow server", state.server)
            write_state(ClusterState())


def _start_missing(arguments: UpArguments, before: ClusterState, say: Say) -> ClusterState:
    """Start the head, the server or both if they do not run."""
    server, head = _if_alive(before.server, "MLflow server", say), _if_alive(before.head, "Ray head", say)
    if server or head:
        _refuse_other_port("--mlflow-port", arguments.asked_mlflow_port, before.server)
        _refuse_other_port("--dashboard-port", arguments.asked_dashboard_port, before.head)
    _clear(replace(before, server=None) if server else before, head)
    # One that died comes back where the other expects it. All ports are claimed before anything starts.
    stays = before if server or head else ClusterState()
    server_port = server.port if server else claim_port(_port(stays.server, arguments.mlflow_port), "--mlflow-port")
    head_port = head.port if head else claim_port(_port(stays.head, arguments.dashboard_port), "--dashboard-port")
    missing = [name for name, service in (("Ray head", head), ("MLflow server", server)) if service is None]
    if missing:
        say(f"starting {' and '.join(missing)} ...")
    began = time.monotonic()
    started: list[Service] = []
    try:
        if server is None:
            server = start_server(server_port)
            started.append(server)
            write_state(ClusterState(stays.head, server))
        if head is None:
            head = start_head(head_port, server)
            started.append(head)
            write_state(ClusterState(head, server))
        # What runs already may be what an `up` left that was cut off before it was ready.
        waiting = [service for service in (server, head) if service in started or not _is_ready(service)]
        _wait_until_ready(waiting, began, say)
    except BaseException:
        for service in started:
            end(service)
            if isinstance(service, Head):
                keep_logs(service)
        write_state(stays)
        raise
    return ClusterState(head, server)


def _clear(dead: ClusterState, head: Head | None) -> None:
    """Remove what is left of services that died."""
    if dead.server:
        end(dead.server)
    if dead.head and not head:
        end(dead.head)
        keep_logs(dead.head)


def _wait_until_ready(waiting: list[Service], began: float, say: Say) -> None:
    told = began
    while waiting:
        for service in list(waiting):
            # Looked at first: a process that ends right after it answered is noticed by the next command.
            alive = service.alive
            if _is_ready(service):
                say(f"{_name(service)} ready after {time.monotonic() - began:.1f} s")
                waiting.remove(service)
            elif not alive or time.monotonic() - began > _START_TIMEOUT_S:
                what = "does not answer" if alive else "ended at once"
                raise UserError(f"{_name(service)} {what}; its log, {service.log}, ends with: {last_line(service.log)}")
        if waiting and time.monotonic() - told > _STILL_EVERY_S:
            told = time.monotonic()
            say(f"waiting for {' and '.join(map(_name, waiting))}, {told - began:.0f} s ...")
        time.sleep(_POLL_S)


def _end(name: str, service: Service) -> None:
    began = time.monotonic()
    was_alive = service.alive
    end(service)
    took = f"after {time.monotonic() - began:.1f} s"
    print(f"{name} has ended {took}" if was_alive else f"{name} had ended by itself", flush=True)


def _if_alive(service: AnyService | None, name: str, say: Say) -> AnyService | None:
    if service is None:
        return None
    if service.alive:
        say(f"{name} runs already, since {_since(service)}")
        return service
    say(f"{name} has ended by itself; its log, {service.log}, ends with: {last_line(service.log)}")
    return None


def _refuse_other_port(option: str, asked: int | None, running: Service | None) -> None:
    if asked and running and running.port != asked:
        raise UserError(f"{option}: port {running.port} is in use for this already; run steadymoe down first")


def _port(died: Service | None, asked: int) -> int:
    return died.port if died else asked


def _is_ready(service: Service) -> bool:
    return _dashboard(service).is_ready() if isinstance(service, Head) else server_is_ready(service)


def _name(service: Service) -> str:
    return "Ray head" if isinstance(service, Head) else "MLflow server"


def _dashboard(head: Service) -> Dashboard:
    return Dashboard(head.address, token_file())


def _standing(name: str, service: Service | None) -> str:
    if service is None:
        return f"{name:<7} does not run; steadymoe up starts it"
    if not service.alive:
        return f"{name:<7} has ended by itself (log {service.log}); steadymoe up starts it again"
    return f"{name:<7} {service.address}  since {_since(service)}"


def _since(service: Service) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(service.started))
    return f"{when} ({clock(time.time() - service.started)})"


def _print_jobs(jobs: list[Job]) -> None:
    print(f"jobs    {len(jobs)}" + (f", the last {_JOBS_SHOWN}:" if len(jobs) > _JOBS_SHOWN else ":" if jobs else ""))
    for job in jobs[-_JOBS_SHOWN:]:
        code = f" ({job.exit_code})" if job.exit_code else ""
        print(f"  {job.id}  {job.status + code:<12} {clock(job.seconds):>7}  {job.entrypoint}")


def _print_drivers(drivers: list[Driver]) -> None:
    if drivers:
        print(f"others  {len(drivers)}, which are no jobs; end them yourself before steadymoe down:")
    for driver in drivers:
        print(f"  process {driver.pid:<32} {clock(driver.seconds):>7}  {driver.entrypoint}")


def _to_stdout(text: str) -> None:
    with suppress(BrokenPipeError):
        print(text, flush=True)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
