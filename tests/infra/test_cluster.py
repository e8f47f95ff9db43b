"""`steadymoe up`, `status` and `down` with real processes: what runs, what listens where, and what is left."""

import json
import os
import re
import stat
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipelines.run_folder import read_json
from tests.infra.local_cluster import (
    LocalCluster,
    beyond_loopback,
    command_lines,
    fetch,
    having,
    listening,
    living,
    marked,
    tree,
)
from tests.pipelines.small_run import SETTINGS

pytestmark = pytest.mark.slow


@pytest.fixture
def own(tmp_path: Path) -> Iterator[LocalCluster]:
    """A home of the test's own; nothing runs yet."""
    found = LocalCluster(tmp_path)
    yield found
    found.run("down")


@pytest.fixture(scope="module")
def second(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A cluster of another home beside the first one, which tests may harm and take down."""
    found = LocalCluster(tmp_path_factory.mktemp("second"))
    found.up()
    yield found
    found.run("down")


def test_up_status_and_down_leave_nothing(own: LocalCluster) -> None:
    assert "Nothing runs" in own.run("status").stdout
    first = own.run("up", "--dashboard-port", "0", "--mlflow-port", "0")
    head, server = own.head, own.server
    for link in (head.address, server.address):
        assert link in first.stdout
    processes = [*head.members(), *server.members()]
    # A head alone is a dozen processes.
    assert len(processes) > 10
    # No terminal, and a session of its own: closing the terminal ends nothing.
    for service in (head, server):
        assert os.getsid(service.pid) == service.pid
        assert psutil.Process(service.pid).terminal() is None

    again = own.run("up")
    assert "Ray head runs already" in again.stdout
    assert "MLflow server runs already" in again.stdout
    assert (own.head, own.server) == (head, server)
    refused = own.run("up", "--mlflow-port", "1025", code=2)
    assert re.fullmatch(
        rf"error: --mlflow-port: port {server.port} is in use .* steadymoe down first\n", refused.stderr
    )

    status = own.run("status").stdout
    assert head.address in status
    assert server.address in status
    assert re.search(r"^jobs +0$", status, re.MULTILINE)

    ended = own.run("down")
    assert ended.stderr == ""
    assert living(processes) == []
    assert marked(head.mark) + marked(server.mark) == []
    assert not Path(head.temp_dir).exists()
    assert (own.home / "cluster" / "ray_logs").is_dir()
    for port in (head.port, head.gcs_port, server.port):
        assert not any(c.laddr.port == port for c in psutil.net_connections() if c.status == psutil.CONN_LISTEN)
    assert "Nothing runs" in own.run("down").stdout
    assert "Nothing runs" in own.run("status").stdout


def test_nothing_listens_beyond_loopback(cluster: LocalCluster) -> None:
    addresses = listening([*cluster.head.members(), *cluster.server.members()])
    assert {cluster.head.port, cluster.head.gcs_port, cluster.server.port} <= {port for _, port in addresses}
    assert beyond_loopback(addresses) == set()


def test_the_token_is_asked_for_and_told_to_nobody(cluster: LocalCluster) -> None:
    file = cluster.home / "cluster" / "token"
    token = file.read_text()
    assert len(token) == 64
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(urllib.error.HTTPError) as refused:
        fetch(f"{cluster.head.address}/api/jobs/")
    assert refused.value.code == 401
    assert stat.S_IMODE(Path(cluster.head.temp_dir).parent.stat().st_mode) == 0o700
    shown = [cluster.run(*words).stdout for words in (("status",), ("up",), ("up", "--exports"))]
    shown += command_lines(cluster.head.members())
    folders = [cluster.home / "cluster", *Path(cluster.head.temp_dir).glob("session_*/logs")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path != file]
    shown += [path.read_bytes().decode(errors="replace") for path in files]
    assert len(shown) > 30
    assert [text for text in shown if token in text] == []


def test_what_died_is_started_again_beside_another_home(cluster: LocalCluster, second: LocalCluster) -> None:
    head, server = second.head, second.server
    assert len({head.port, server.port, cluster.head.port, cluster.server.port}) == 4
    psutil.Process(server.pid).kill()
    assert "MLflow  has ended by itself" in second.run("status").stdout
    assert "Ray head runs already" in second.run("up").stdout
    assert second.head == head
    assert (second.server.port, second.server.pid != server.pid) == (server.port, True)

    # Not even asked: the head's own children end with it, and its successor clears up the rest.
    psutil.Process(head.pid).kill()
    server = second.server
    assert "MLflow server runs already" in second.run("up").stdout
    assert second.server == server
    assert (second.head.port, second.head.pid != head.pid) == (head.port, True)
    assert marked(head.mark) == []
    assert not Path(head.temp_dir).exists()


DRIVER = "import time, ray; ray.init(log_to_driver=False); print('connected', flush=True); time.sleep(600)"


def test_down_refuses_while_a_driver_that_is_no_job_works_on_the_head_and_leaves_other_homes_alone(
    cluster: LocalCluster, second: LocalCluster
) -> None:
    program = [sys.executable, "-c", DRIVER]
    with subprocess.Popen(program, env=second.exports(), stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            assert driver.stdout.readline() == "connected\n"
            assert re.search(rf"^  process {driver.pid} .*ray\.init", second.run("status").stdout, re.MULTILINE)
            refused = second.run("down", code=2)
            assert re.fullmatch(rf"error: down would end .*: {driver.pid} \(.*\)\n", refused.stderr)
            assert second.head.alive
            assert second.server.alive
        finally:
            driver.kill()
    assert "Ray head has ended" in second.run("down").stdout
    for service in (cluster.head, cluster.server):
        assert service.alive


def test_an_experiment_is_the_same_through_the_server_and_through_the_database(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    through_server = MlflowClient(cluster.server.address)
    direct = MlflowClient(f"sqlite:///{cluster.home / 'mlflow.db'}")
    script = (
        "import sys; from pipelines.tracking_store import open_store; print(open_store(sys.argv[1]).experiment_id('E'))"
    )
    note = tmp_path / "note.txt"
    note.write_text("kept")
    for name, first, second in (("server first", through_server, direct), ("database first", direct, through_server)):
        ids = []
        for client in (first, second):
            done = cluster_python(cluster, script.replace("'E'", repr(name)), client.tracking_uri)
            ids.append(done)
            run = client.create_run(done)
            client.log_artifact(run.info.run_id, str(note))
            for reader in (through_server, direct):
                assert [file.path for file in reader.list_artifacts(run.info.run_id)] == ["note.txt"]
            # As the UI reads it.
            link = f"{cluster.server.address}/get-artifact?path=note.txt&run_uuid={run.info.run_id}"
            assert fetch(link) == b"kept"
        assert ids[0] == ids[1]


def cluster_python(cluster: LocalCluster, script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.strip()


def test_a_run_without_a_cluster_listens_on_loopback_alone_and_joins_no_other(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    own = LocalCluster(tmp_path)
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    jobs_before = len(json.loads(ask(cluster, "/api/jobs/")))
    run = own.popen("train", "micro", *sets, "--set", "parallel.workers=2")
    seen: set[tuple[str, int]] = set()
    names: set[str] = set()
    while run.poll() is None:
        processes = tree(run.pid)
        for process in processes:
            with suppress(psutil.Error):
                names.add(process.name())
        seen |= listening(processes)
        time.sleep(0.5)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert {"gcs_server", "raylet"} <= names
    assert len(seen) > 3
    assert beyond_loopback(seen) == set()
    assert len(json.loads(ask(cluster, "/api/jobs/"))) == jobs_before


def ask(cluster: LocalCluster, path: str) -> bytes:
    token = (cluster.home / "cluster" / "token").read_text()
    return fetch(cluster.head.address + path, Authorization=f"Bearer {token}")


def test_a_start_that_fails_says_why_and_leaves_nothing(own: LocalCluster, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "mlflow.py").write_text("print('half an installation'); raise SystemExit(1)")
    path = {"PYTHONPATH": os.pathsep.join([str(broken), own.environment["PYTHONPATH"]])}
    failed = own.run("up", "--dashboard-port", "0", "--mlflow-port", "0", code=2, extra=path)
    assert failed.stderr == (
        f"error: MLflow server ended at once; its log, {own.home}/cluster/mlflow.log, ends with: half an installation\n"
    )
    assert read_json(own.home / "cluster" / "state.json") == {"head": None, "server": None}
    assert having("STEADYMOE_HOME", str(own.home)) == []
