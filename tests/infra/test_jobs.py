"""`steadymoe submit` and Ray's own client on a real head: output, exit codes, stopping, what a job leaves behind."""

import functools
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pipelines.job import JOB_TAG
from tests.infra.local_cluster import PROGRAM, PROJECT, LocalCluster, command_lines
from tests.pipelines.small_run import PACKAGES, SETTINGS, STDLIB

pytestmark = pytest.mark.slow

SHORT = [word for s in (*SETTINGS, "schedule.steps=3", "schedule.warmup_steps=1") for word in ("--set", s)]
# After all the jobs that other tests have run on the same head. About 20 s each on two cores, of which 13 s are the
# start of Ray Train; several times that on busy ones.
JOBS_IN_A_ROW = 2
JOBS_IN_A_ROW_S = 1200


def runs_of(cluster: LocalCluster, job_id: str) -> list[Run]:
    """The runs that the database, opened without the server, has of a job."""
    client = MlflowClient(f"sqlite:///{cluster.home / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found: list[Run] = list(client.search_runs(experiments, f"tags.`{JOB_TAG}` = '{job_id}'"))
    return found


def job_in(output: str) -> str:
    found = re.search(r"raysubmit_\w+", output)
    assert found is not None, output
    return found.group()


@functools.cache
def exports_at(home: Path) -> dict[str, str]:
    """What `up --exports` gives; here it is the same for as long as a head runs."""
    return LocalCluster(home).exports()


def ray_job(cluster: LocalCluster, *words: str) -> str:
    """Run ``ray job WORDS`` with nothing but what `up --exports` gives."""
    program = (sys.executable, "-m", "ray.scripts.scripts", "job", *words)
    done = subprocess.run(
        program, env=exports_at(cluster.home), cwd=PROJECT, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start_script(cluster: LocalCluster, script: str, **variables: str) -> str:
    """Submit any Python script as a job with these environment variables; returns the job's id."""
    (cluster.home / "script.py").write_text(script)
    options = ["--no-wait", "--runtime-env-json", json.dumps({"env_vars": variables})]
    return job_in(ray_job(cluster, "submit", *options, "--", sys.executable, str(cluster.home / "script.py")))


def test_a_submitted_run_shows_its_progress_and_is_in_mlflow_with_its_job(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    for package in PACKAGES:
        shutil.copytree(STDLIB / package, tmp_path / "text" / package)
    # A file outside of the project, with a path that holds where the command was typed.
    (tmp_path / "mine.yaml").write_text("data: {corpus: {kind: files, paths: [text]}}\nschedule: {steps: 3}\n")
    sets = [word for s in SETTINGS if not s.startswith(("data.corpus", "schedule.steps")) for word in ("--set", s)]
    done = cluster.run("submit", "--", "train", "micro", "mine.yaml", *sets, cwd=tmp_path)
    assert re.search(r"^step 3/3 .*loss", done.stdout, re.MULTILINE)
    # Neither the frameworks' own tales nor escape sequences.
    noise = [line for line in done.stderr.splitlines() if "INFO" in line or "WARN" in line]
    assert (noise, "\x1b" in done.stdout) == ([], False)
    (run,) = runs_of(cluster, job_in(done.stdout))
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train/loss"] > 0
    assert str(tmp_path / "text") in run.data.params["data.corpus.paths"]
    assert f"{cluster.server.address}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}" in done.stdout
    status = cluster.run("status").stdout
    assert re.search(rf"{job_in(done.stdout)} +SUCCEEDED", status)


def test_rays_own_client_does_the_same(cluster: LocalCluster) -> None:
    output = ray_job(cluster, "submit", "--working-dir", ".", "--", "python", "-m", "pipelines.train", "micro", *SHORT)
    assert "steadymoe: exit code 0" in output
    (run,) = runs_of(cluster, job_in(output))
    assert run.info.status == "FINISHED"


def test_a_mistake_that_shows_in_the_job_ends_with_2(cluster: LocalCluster, tmp_path: Path) -> None:
    corpus = ["--set", "data.corpus.kind=files", "--set", "data.corpus.paths=[none.txt]"]
    done = cluster.run("submit", "--", "train", "micro", *corpus, code=2, cwd=tmp_path)
    assert f"error: data.corpus: {tmp_path}/none.txt: does not exist" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert runs_of(cluster, job_in(done.stdout)) == []


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("import sys; sys.exit(3)", 3),
        ("raise ValueError", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
)
def test_any_exit_code_is_passed_on(cluster: LocalCluster, script: str, code: int) -> None:
    cluster.run("submit", "--watch", start_script(cluster, script), code=code)


def test_an_unknown_job_is_refused(cluster: LocalCluster) -> None:
    assert "raysubmit_none: the Ray head knows no such job" in cluster.run(
        "submit", "--watch", "raysubmit_none", code=2
    ).stderr  # fmt: skip


# Saves for longer than the 3 s that Ray gives by itself.
SAVES = """
import signal, sys, time
def save(*_):
    print("told to stop", flush=True)
    time.sleep(4)
    print("saved\\nsteadymoe: exit code 130", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
print("working", flush=True)
time.sleep(600)
"""
SAVES_FOR_EVER = SAVES.replace("sleep(4)", "sleep(600)")


@pytest.mark.parametrize(
    ("script", "variables", "code", "last"),
    [(SAVES, {}, 130, "saved"), (SAVES_FOR_EVER, {"RAY_JOB_STOP_WAIT_TIME_S": "5"}, 1, "before it could")],
)
def test_a_job_is_stopped_with_time_to_save_and_told_of_truly(
    cluster: LocalCluster, script: str, variables: dict[str, str], code: int, last: str
) -> None:
    with cluster.popen("submit", "--watch", start_script(cluster, script, **variables)) as watching:
        assert watching.stdout is not None
        lines = []
        for line in watching.stdout:
            lines.append(line)
            if line == "working\n":
                # Without a terminal there is nobody to ask.
                watching.send_signal(signal.SIGINT)
        output = "".join(lines)
    assert watching.returncode == code, output
    assert "told to stop" in output
    assert last in output


def test_a_training_job_that_is_stopped_saves_and_can_be_resumed_as_a_job(cluster: LocalCluster) -> None:
    settings = [*SHORT, "--set", "schedule.steps=100000", "--set", "tracking.run_name=stopped"]
    with cluster.popen("submit", "--", "train", "micro", *settings) as watching:
        assert watching.stdout is not None
        lines = []
        for line in watching.stdout:
            lines.append(line)
            if re.match(r"step +1/", line):
                watching.send_signal(signal.SIGINT)
        output = "".join(lines)
    assert watching.returncode == 130, output
    (run,) = runs_of(cluster, job_in(output))
    assert run.info.status == "KILLED"
    more = ["--set", f"schedule.steps={last_step(cluster, run) + 3}"]
    done = cluster.run("submit", "--", "train", "--resume", "stopped", *more)
    (again,) = runs_of(cluster, job_in(done.stdout))
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")


def last_step(cluster: LocalCluster, run: Run) -> int:
    client = MlflowClient(f"sqlite:///{cluster.home / 'mlflow.db'}")
    return max(point.step for point in client.get_metric_history(run.info.run_id, "train/loss"))


def test_down_lets_a_job_save(tmp_path: Path) -> None:
    own = LocalCluster(tmp_path)
    try:
        own.up()
        note = tmp_path / "note"
        job_id = start_script(own, SAVES.replace("sys.exit(130)", f"open({str(note)!r}, 'w').close(); sys.exit(130)"))
        while "working" not in ray_job(own, "logs", job_id):
            time.sleep(0.5)
        assert f"stopping job {job_id}" in own.run("down").stdout
        assert note.exists()
    finally:
        own.run("down")


def test_ctrl_c_at_a_terminal_asks_and_may_leave_the_job_alone(cluster: LocalCluster) -> None:
    job_id = start_script(cluster, SAVES)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(PROGRAM[0], [*PROGRAM, "submit", "--watch", job_id], cluster.environment)
    answers = iter([(b"working", b"\x03"), (b"atching?", b"w\n"), (b"watching on", b"\x03"), (b"atching?", b"d\n")])
    wanted, answer = next(answers)
    seen = whole = b""
    with suppress(OSError):
        # A minute without a word is a failure.
        while select.select([terminal], [], [], 60)[0] and (new := os.read(terminal, 1024)):
            seen, whole = seen + new, whole + new
            if wanted in seen:
                os.write(terminal, answer)
                seen = b""
                wanted, answer = next(answers, (b"never", b""))
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGHUP)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, whole
    assert b"The job runs on" in whole
    assert whole.count(b"working") == 1
    assert re.search(rf"{job_id} +RUNNING", cluster.run("status").stdout)
    ray_job(cluster, "stop", job_id)


@contextmanager
def relay(port: int) -> Iterator[tuple[int, list[socket.socket]]]:
    """A port that leads to another one, and the connections that go through it, to be cut."""
    connections: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near = server.accept()[0]
                far = socket.create_connection(("127.0.0.1", port))
                connections.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], connections


def test_a_dropped_connection_loses_and_repeats_no_line(cluster: LocalCluster) -> None:
    script = "import time, sys\nfor n in range(24):\n    print('line', n, flush=True)\n    time.sleep(.3)\nsys.exit(3)"
    job_id = start_script(cluster, script)
    with relay(cluster.head.port) as (port, connections):
        command = [*PROGRAM, "submit", "--address", f"http://127.0.0.1:{port}", "--watch", job_id]
        environment = {**exports_at(cluster.home), "PYTHONPATH": str(PROJECT)}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            lines, cuts = [], 0
            for line in watching.stdout:
                lines.append(line)
                if line in ("line 4\n", "line 12\n"):
                    cuts += 1
                    for connection in connections:
                        with suppress(OSError):
                            connection.shutdown(socket.SHUT_RDWR)
                    connections.clear()
    assert (cuts, watching.returncode) == (2, 3)
    assert [line for line in lines if line.startswith("line")] == [f"line {n}\n" for n in range(24)]


@pytest.mark.timeout(JOBS_IN_A_ROW_S)
def test_many_jobs_in_a_row_leave_nothing_behind(cluster: LocalCluster) -> None:
    assert once_settled(cluster) == NOTHING
    for _ in range(JOBS_IN_A_ROW):
        cluster.run("submit", "--", "train", "micro", *SHORT)
    assert once_settled(cluster) == NOTHING
    client = MlflowClient(f"sqlite:///{cluster.home / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    # Other tests make runs of their own here.
    runs = client.search_runs(experiments, "tags.role = 'train'")
    assert len(runs) >= JOBS_IN_A_ROW
    assert [run.info.run_name for run in runs if run.info.status == "RUNNING"] == []


NOTHING: dict[str, list[str]] = {"actors": [], "placement groups": [], "processes": []}


def once_settled(cluster: LocalCluster) -> dict[str, list[str]]:
    """What is left behind after the time that Ray's processes may take to end after their job."""
    deadline = time.monotonic() + 120
    while (left := left_behind(cluster)) != NOTHING and time.monotonic() < deadline:
        time.sleep(1)
    return left


def left_behind(cluster: LocalCluster) -> dict[str, list[str]]:
    """What a job may leave on a head: living actors and placement groups, and processes that work for it."""
    script = (
        "import json, sys; from ray.util.state import list_actors, list_placement_groups as groups\n"
        "actors = [a.class_name for a in list_actors(sys.argv[1], filters=[('state', '=', 'ALIVE')])]\n"
        "print(json.dumps([sorted(actors), [g.state for g in groups(sys.argv[1]) if g.state != 'REMOVED']]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, cluster.head.address],
        env=exports_at(cluster.home), capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    actors, groups = json.loads(done.stdout.splitlines()[-1])
    return {
        # One of Ray's own per cluster, made by the first training run.
        "actors": [actor for actor in actors if actor != "_AutoscalingCoordinatorActor"],
        "placement groups": groups,
        "processes": sorted(filter(_works_for_a_job, command_lines(cluster.head.members()))),
    }


def _works_for_a_job(name: str) -> bool:
    """Whether the process of this name does; idle workers are Ray's to keep."""
    works = name.startswith("ray::") and "IDLE" not in name and "AutoscalingCoordinator" not in name
    driver = "pipelines" in name or "_ray_pkg_" in name
    agent = re.match(r"ray::(Dashboard|RuntimeEnv)", name)
    return (works or driver) and not agent
