"""A cluster of a test's own: `steadymoe` run as a user runs it, and what is left of it in the system."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from infra.cluster_state import ClusterState, Head
from infra.processes import MARK_VARIABLE, Service
from pipelines.run_folder import read_json

PROJECT = Path(__file__).parents[2]
PROGRAM = (sys.executable, "-c", "import sys; from infra.cli import main; sys.exit(main())")
# What this shell may have from another cluster.
FOREIGN = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_AUTH_MODE",
    "RAY_JOB_STOP_WAIT_TIME_S",
)


@dataclass
class LocalCluster:
    """A STEADYMOE_HOME and the commands on it."""

    home: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in (*FOREIGN, "MLFLOW_TRACKING_URI")}
        return {**kept, "PYTHONPATH": str(PROJECT), "STEADYMOE_HOME": str(self.home)}

    def run(
        self, *words: str, code: int = 0, cwd: Path | None = None, extra: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run ``steadymoe WORDS`` to its end, which must have this exit code."""
        done = subprocess.run(
            [*PROGRAM, *words],
            env={**self.environment, **(extra or {})},
            cwd=cwd or self.home,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == code, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Start ``steadymoe WORDS``; what it prints comes through one pipe."""
        return subprocess.Popen(
            [*PROGRAM, *words],
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def up(self) -> None:
        self.run("up", "--dashboard-port", "0", "--mlflow-port", "0")

    def state(self) -> ClusterState:
        content = read_json(self.home / "cluster" / "state.json")
        head, server = content.get("head"), content.get("server")
        return ClusterState(Head(**head) if head else None, Service(**server) if server else None)

    @property
    def head(self) -> Head:
        head = self.state().head
        assert head is not None
        return head

    @property
    def server(self) -> Service:
        server = self.state().server
        assert server is not None
        return server

    def exports(self) -> dict[str, str]:
        """The environment that ``eval "$(steadymoe up --exports)"`` gives a shell."""
        script = f'eval "$({" ".join(map(_quoted, PROGRAM))} up --exports)" && env -0'
        done = subprocess.run(
            ["bash", "-c", script], env=self.environment, cwd=self.home, capture_output=True, text=True, check=True
        )
        return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if "=" in entry)


def fetch(address: str, **headers: str) -> bytes:
    """What a server on this machine answers, whatever proxy the environment names."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(address, headers=headers), timeout=60) as answer:
        content: bytes = answer.read()
    return content


def tree(pid: int) -> list[psutil.Process]:
    """A process and its descendants."""
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def having(variable: str, value: str) -> list[psutil.Process]:
    """Every living process with this in its environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(variable) == value:
                found.append(process)
    return living(found)


def marked(mark: str) -> list[psutil.Process]:
    """Every living process of the service with this mark."""
    return having(MARK_VARIABLE, mark)


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended; a zombie has."""
    found = []
    for process in processes:
        with suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def command_lines(processes: list[psutil.Process]) -> list[str]:
    """Of those that have not ended meanwhile."""
    found = []
    for process in processes:
        with suppress(psutil.Error):
            found.append(" ".join(process.cmdline()) or process.name())
    return found


def listening(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    """Addresses and ports that these processes listen on."""
    found = set()
    for process in processes:
        with suppress(psutil.Error):
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((connection.laddr.ip, connection.laddr.port))
    return found


def beyond_loopback(addresses: set[tuple[str, int]]) -> set[tuple[str, int]]:
    return {(ip, port) for ip, port in addresses if ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")}


def _quoted(word: str) -> str:
    return f"'{word}'"
