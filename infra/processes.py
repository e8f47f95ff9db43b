"""Background processes that outlive the terminal: started, recognised again, and ended with all that they started."""

import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipelines.errors import UserError

LOOPBACK = "127.0.0.1"

MARK_VARIABLE = "STEADYMOE_SERVICE"
"""In the environment of a service and of everything that it starts: by it a process that left the tree is found."""

_GRACE_S = 20.0
_KILL_WAIT_S = 5.0


@dataclass(frozen=True)
class Service:
    """One background process and where it listens."""

    pid: int
    started: float
    """Creation time of the process, seconds since 1970: with the pid it names one process for ever."""
    mark: str
    """Value of ``STEADYMOE_SERVICE``."""
    port: int
    log: str
    """File with what it prints."""

    @property
    def address(self) -> str:
        """Where people and clients find it."""
        return f"http://{LOOPBACK}:{self.port}"

    def process(self) -> psutil.Process | None:
        """The process itself; None if it has ended."""
        try:
            process = psutil.Process(self.pid)
            # The time is computed from the boot time and may differ in its last digits.
            same = abs(process.create_time() - self.started) < 0.1
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
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
    return Service(process.pid, psutil.Process(process.pid).create_time(), mark, port, str(log))


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
    try:
        with socket.socket() as probe:
            # A port that a server has just left is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((LOOPBACK, wanted))
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        if isinstance(error, OverflowError) or not _is_taken(wanted):
            raise UserError(f"{option}: cannot listen on port {wanted}: {error}") from None
        raise UserError(
            f"{option}: port {wanted} is taken by {_holder(wanted)}; give another port, or 0 for any that is free"
        ) from None


def last_line(log: str) -> str:
    """The last line with anything in it of a log file."""
    with suppress(OSError):
        lines = Path(log).read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    return "nothing"


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
