"""Background processes that outlive the terminal: started, recognised again, and ended with all that they started."""

import os
import random
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipelines.errors import UserError

LOOPBACK = "127.0.0.1"

MARK_VARIABLE = "STEADYMOE_SERVICE"
"""In the environment of a service and of everything that it starts: by it a process that left the tree is found."""

# Below the ports that systems give to outgoing connections (from 32768 on Linux), for a claimed port is free until its
# server starts. None comes twice within one command.
_UNCLAIMED = iter(random.Random().sample(range(20_000, 32_000), 1_000))

_SHOWN_AFTER_S = 5.0
_GRACE_S = 20.0
_KILL_WAIT_S = 5.0


@dataclass(frozen=True)
class Service:
    """One background process and where it listens."""

    pid: int
    started: float
    """When it was started, seconds since 1970; for people, because clocks are set."""
    mark: str
    """Value of ``STEADYMOE_SERVICE``: a process with this pid and another mark, or one of another user, is not it."""
    port: int
    log: str
    """File with what it prints."""

    @property
    def address(self) -> str:
        """Where people and clients find it."""
        return f"http://{LOOPBACK}:{self.port}"

    def process(self) -> psutil.Process | None:
        """The process itself; None if it has ended."""
        with suppress(psutil.Error, OSError):
            process = psutil.Process(self.pid)
            if process.environ().get(MARK_VARIABLE) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self.process() is not None

    def members(self) -> list[psutil.Process]:
        """The process and everything that it has started, by descent, by session and by mark."""
        root = self.process()
        found = {process.pid: process for process in root.children(recursive=True)} if root else {}
        if root:
            found[root.pid] = root
        # Its pid is also the id of its session, and is not given to another process while the session has any.
        foreign_session = root is None and psutil.pid_exists(self.pid)
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                in_session = not foreign_session and os.getsid(process.pid) == self.pid
                if in_session or process.environ().get(MARK_VARIABLE) == self.mark:
                    found[process.pid] = process
        return [process for process in found.values() if _is_running(process)]


def start(command: Sequence[str], environment: Mapping[str, str], mark: str, port: int, log: Path) -> Service:
    """Start a process in a session of its own, so that a closed terminal or a Ctrl-C does not reach it.

    Args:
        command: program and arguments.
        environment: all of its environment variables, but the mark.
        mark: unique to this service.
        port: where it will listen.
        log: file that takes what it prints, and is written anew.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command),
            env={**environment, MARK_VARIABLE: mark},
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service = Service(process.pid, time.time(), mark, port, str(log))
    # The system may show the environment of a new program a moment after it has begun.
    deadline = time.monotonic() + _SHOWN_AFTER_S
    while not service.alive and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    return service


def end(service: Service) -> None:
    """End a service and everything that it started: asked first, and killed after 20 s."""
    if root := service.process():
        members = service.members()
        root.terminate()
        psutil.wait_procs(members, timeout=_GRACE_S)
    for _ in range(3):
        left = service.members()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_KILL_WAIT_S)
        if not left:
            return


def claim_port(wanted: int, option: str) -> int:
    """A port of the loopback interface that is free: the wanted one, or any for 0.

    Raises:
        UserError: it is taken; says by whom, and names the option.
    """
    if not wanted:
        return free_port()
    try:
        _bind(wanted)
    except (OSError, OverflowError) as error:
        if isinstance(error, OverflowError) or not _is_taken(wanted):
            raise UserError(f"{option}: cannot listen on port {wanted}: {error}") from None
        raise UserError(
            f"{option}: port {wanted} is taken by {_holder(wanted)}; give another port, or 0 for any that is free"
        ) from None
    return wanted


def free_port() -> int:
    """Any port of the loopback interface that is free, and likely to stay so until a server takes it."""
    for port in _UNCLAIMED:
        with suppress(OSError):
            _bind(port)
            return port
    raise UserError("no port from 20000 to 31999 is free on this machine; end some servers")


def last_line(log: str) -> str:
    """The last line with anything in it of a log file."""
    with suppress(OSError):
        lines = Path(log).read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    return "nothing"


def _bind(port: int) -> None:
    """OSError or OverflowError if no server can listen there."""
    with socket.socket() as probe:
        # A port that a server has just left is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((LOOPBACK, port))


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOOPBACK, port)) == 0


def _holder(port: int) -> str:
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            if listens and connection.pid:
                process = psutil.Process(connection.pid)
                return f"process {process.pid} ({' '.join(process.cmdline())[:80].strip() or process.name()})"
    return "a process of another user"


def _is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
