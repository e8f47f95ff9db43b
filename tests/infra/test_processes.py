"""Background processes: ended with all that they started, and never mistaken for others."""

import dataclasses
import os
import re
import socket
import sys
from pathlib import Path

import psutil
import pytest

from infra import processes
from infra.processes import claim_port, end, free_port, last_line, start
from pipelines.errors import UserError
from tests.infra.local_cluster import marked

# A parent, a child in its session, and a grandchild that leaves both the session and the tree.
FAMILY = """
import os, subprocess, sys, time
subprocess.Popen(["sleep", "600"])
leaves = "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)"
subprocess.Popen([sys.executable, "-c", leaves])
open(sys.argv[1], "w").close()
time.sleep(600)
"""


def wait_for(path: Path, mark: str, count: int) -> None:
    for _ in range(400):
        if path.exists() and [p.name() for p in marked(mark)].count("sleep") == count:
            return
        psutil.Process().cpu_percent(0.05)
    raise AssertionError(f"{path} {marked(mark)}")


@pytest.mark.parametrize("root_dies_first", [pytest.param(False, marks=pytest.mark.slow), True])
def test_ending_a_service_ends_all_that_it_started(
    tmp_path: Path, root_dies_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The family does not end by itself when it is asked.
    monkeypatch.setattr(processes, "_GRACE_S", 1.0)
    sign, mark = tmp_path / "sign", f"test-{tmp_path}"
    service = start([sys.executable, "-c", FAMILY, str(sign)], os.environ, mark, 1, tmp_path / "log")
    try:
        wait_for(sign, mark, 2)
        assert service.alive
        if root_dies_first:
            psutil.Process(service.pid).kill()
            psutil.Process(service.pid).wait()
            assert not service.alive
    finally:
        end(service)
    assert marked(mark) == []
    assert service.members() == []
    end(service)


def test_another_process_with_the_same_pid_is_not_the_service(tmp_path: Path) -> None:
    service = start(["sleep", "600"], os.environ, f"test-{tmp_path}", 1, tmp_path / "log")
    try:
        earlier = dataclasses.replace(service, mark="of another time")
        assert not earlier.alive
        end(earlier)
        assert service.alive
    finally:
        end(service)
    assert not service.alive


def test_a_clock_that_was_set_changes_nothing(tmp_path: Path) -> None:
    service = start(["sleep", "600"], os.environ, f"test-{tmp_path}", 1, tmp_path / "log")
    try:
        assert dataclasses.replace(service, started=service.started - 3600).alive
    finally:
        end(service)


def test_a_process_of_another_user_is_not_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(process: psutil.Process) -> dict[str, str]:
        raise psutil.AccessDenied(process.pid)

    service = start(["sleep", "600"], os.environ, f"test-{tmp_path}", 1, tmp_path / "log")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(psutil.Process, "environ", denied)
            assert not service.alive
        assert service.alive
    finally:
        end(service)


def test_a_taken_port_names_its_holder_and_the_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError) as refused:
            claim_port(port, "--some-port")
    assert re.fullmatch(
        rf"--some-port: port {port} is taken by process {os.getpid()} \(.+\); give another port, or 0 .*",
        str(refused.value),
    )
    assert claim_port(port, "--some-port") == port


def test_free_ports_are_different_ones_that_no_outgoing_connection_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = [claim_port(0, "--some-port") for _ in range(50)]
    assert len(set(ports)) == 50
    assert all(20_000 <= port < 32_000 for port in ports)
    with socket.create_server(("127.0.0.1", ports[0])):
        monkeypatch.setattr(processes, "_UNCLAIMED", iter(ports[:2]))
        assert free_port() == ports[1]


def test_the_last_line_of_a_log_is_the_last_with_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_line(str(log)) == "nothing"
    log.write_bytes(b"first\nsecond \xff\n \n\n")
    assert last_line(str(log)) == "second \ufffd"
