"""What `steadymoe up` has started for a STEADYMOE_HOME, as a file that `status`, `down` and `submit` read."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.processes import LOOPBACK, Service
from pipelines.home import HOME_VARIABLE, home
from pipelines.run_folder import read_json, write_json
from pipelines.tracking_store import URI_VARIABLE


@dataclass(frozen=True)
class Head(Service):
    """The Ray head; its port is that of the dashboard, which also takes jobs."""

    gcs_port: int
    """Where drivers and workers connect to."""
    temp_dir: str
    """Ray's folder of sockets and logs."""

    @property
    def gcs_address(self) -> str:
        """What ``ray.init`` and RAY_ADDRESS take."""
        return f"{LOOPBACK}:{self.gcs_port}"


@dataclass(frozen=True)
class ClusterState:
    """The processes of one STEADYMOE_HOME; they may have died since."""

    head: Head | None = None
    server: Service | None = None


def cluster_dir() -> Path:
    """State, token and logs of the cluster."""
    return home() / "cluster"


def token_file() -> Path:
    """The token that the head asks of its clients."""
    return cluster_dir() / "token"


def read_state() -> ClusterState:
    """What was started and not ended; empty if nothing was."""
    # Where STEADYMOE_HOME is a file there is none either.
    content = read_json(_state_file()) if _state_file().is_file() else {}
    head, server = content.get("head"), content.get("server")
    return ClusterState(Head(**head) if head else None, Service(**server) if server else None)


def write_state(state: ClusterState) -> None:
    """Remember what runs."""
    write_json(_state_file(), asdict(state))


@contextmanager
def locked() -> Iterator[None]:
    """One `up` or `down` at a time; another waits."""
    cluster_dir().mkdir(parents=True, exist_ok=True)
    with (cluster_dir() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ensure_token() -> Path:
    """The token's file, readable by its owner alone; made if there is none. It stays the same from `up` to `up`.

    Ray's own place, ~/.ray/auth_token, is not used: Ray writes it readable for everyone, and a token there changes how
    other clusters of this user start.
    """
    path = token_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        path.chmod(0o600)
    return path


def client_environment(state: ClusterState) -> dict[str, str]:
    """Environment variables with which Ray's own client, a driver and MLflow find what runs, past any proxy."""
    found = {HOME_VARIABLE: str(home()), **dict.fromkeys(("no_proxy", "NO_PROXY"), _without_proxy())}
    if state.head:
        found |= {
            "RAY_API_SERVER_ADDRESS": state.head.address,
            "RAY_ADDRESS": state.head.gcs_address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file()),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
    if state.server:
        found[URI_VARIABLE] = state.server.address
    return found


def _without_proxy() -> str:
    """The hosts that are reached without a proxy: those that the user has named, and this machine."""
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    # A star alone means every host, and only alone.
    if named.strip() == "*":
        return named
    hosts = [host.strip() for host in named.split(",") if host.strip()]
    return ",".join([*hosts, *(host for host in (LOOPBACK, "localhost") if host not in hosts)])


def _state_file() -> Path:
    return cluster_dir() / "state.json"
