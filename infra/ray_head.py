"""The Ray head of `steadymoe up`: how it is started, what its jobs inherit, and what becomes of its files."""

import os
import shutil
import sys
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

from infra.cluster_state import ClusterState, Head, client_environment, cluster_dir, ensure_token
from infra.processes import LOOPBACK as LOOPBACK_ADDRESS
from infra.processes import Service, free_port, start
from pipelines.errors import UserError
from pipelines.ray_session import LOOPBACK, QUIET_AND_QUICK

JOB_STOP_WAIT_S = 120
"""How long a job that is asked to stop may take to save; Ray's default of 3 s is too short for a checkpoint."""

STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
"""Read by Ray in the environment of a head, or of a single job, which wins."""

# A socket's path may have 107 characters; Ray appends 68 to its folder, and the user's id may have 10.
_LONGEST_TEMP = 9

_SESSIONS_KEPT = 5


def start_head(port: int, server: Service | None) -> Head:
    """Start a head whose jobs find the server, the token and this STEADYMOE_HOME in their environment."""
    mark = uuid.uuid4().hex
    # Ray opens this port on its own account and cannot be told to leave it (it stands for ray:// clients).
    client_port, gcs_port = free_port(), free_port()
    temp_dir = _private_temp() / mark[:8]
    temp_dir.mkdir()
    # As a child that blocks, the head ends whatever it started when it is told to end, and also when it is killed.
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--port", str(gcs_port), "--ray-client-server-port", str(client_port)),
        *("--dashboard-host", LOOPBACK_ADDRESS, "--dashboard-port", str(port), "--dashboard-agent-listen-port", "0"),
        # Any free ports: two heads would otherwise give their workers the same ones.
        *("--min-worker-port", "0", "--max-worker-port", "0", "--temp-dir", str(temp_dir)),
    ]
    service = start(command, head_environment(server), mark, port, cluster_dir() / "head.log")
    return Head(**vars(service), gcs_port=gcs_port, temp_dir=str(temp_dir))


def head_environment(server: Service | None) -> dict[str, str]:
    """The environment of the head, which its workers and the drivers of its jobs inherit."""
    # Where this shell's own clients connect to is nothing to the head, and a token here would win over the file.
    left_out = {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR"}
    inherited = {name: value for name, value in os.environ.items() if name not in left_out}
    return {
        **QUIET_AND_QUICK,
        STOP_WAIT_VARIABLE: str(JOB_STOP_WAIT_S),
        **inherited,
        **client_environment(ClusterState(server=server)),
        **LOOPBACK,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(ensure_token()),
        # Jobs are over before the head is ended, so that nothing is left to drain; Ray would wait 30 s.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # Jobs are started as "python -m ...": that is to be this Python, in an activated environment or not.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)]),
    }


def stop_wait_s(head: Head) -> int:
    """How long this head gives a job to save."""
    process = head.process()
    chosen = process.environ().get(STOP_WAIT_VARIABLE, "") if process else ""
    return int(chosen) if chosen.isdigit() else JOB_STOP_WAIT_S


def keep_logs(head: Head) -> None:
    """Move the logs of a head that has ended to the cluster's folder, and remove its temporary one."""
    temp_dir = Path(head.temp_dir)
    for session in temp_dir.glob("session_*"):
        if session.is_symlink() or not (session / "logs").is_dir():
            continue
        kept = cluster_dir() / "ray_logs" / session.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            shutil.move(session / "logs", kept)
    shutil.rmtree(temp_dir, ignore_errors=True)
    for old in sorted((cluster_dir() / "ray_logs").glob("session_*"))[:-_SESSIONS_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _private_temp() -> Path:
    """A short folder that no other user can enter: Ray makes all that it puts there accessible to everyone."""
    base = tempfile.gettempdir()
    path = Path(base if len(base) <= _LONGEST_TEMP else "/tmp") / f"steadymoe-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if path.is_symlink() or status.st_uid != os.getuid():
        raise UserError(f"{path}: belongs to another user; remove it, or set TMPDIR to a folder of your own")
    path.chmod(0o700)
    return path
