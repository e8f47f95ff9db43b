"""The command ``steadymoe`` as a process of its own, with Ray and MLflow under a home of its own; to be killed, too."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from pipelines.run_folder import RunFolder, run_folders
from pipelines.spool import TRAIN, SpoolReader
from tests.pipelines.mlflow_server import wait_until
from tests.pipelines.small_run import SETTINGS

_COMMAND = [sys.executable, "-c", "import sys; from infra.cli import main; sys.exit(main())"]
_DEADLINE_S = 280


def environment(home: Path, **more: str) -> dict[str, str]:
    """The caller's environment without what leads to another cluster or database."""
    kept = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    return {**kept, "STEADYMOE_HOME": str(home), **more}


def run_steadymoe(home: Path, *arguments: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """Run ``steadymoe ARGUMENTS`` to its end, which must have this exit code."""
    done = subprocess.run(
        [*_COMMAND, *arguments],
        env=environment(home, **more),
        capture_output=True,
        text=True,
        timeout=_DEADLINE_S,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def sets(*settings: str) -> list[str]:
    """``--set`` options that make a run small, with ``settings`` on top."""
    keys = {setting.partition("=")[0] for setting in settings}
    chosen = [*(s for s in SETTINGS if s.partition("=")[0] not in keys), *settings]
    return [word for setting in chosen for word in ("--set", setting)]


def folders() -> dict[str, RunFolder]:
    """The runs of the home that STEADYMOE_HOME names in this process, by name."""
    return {folder.info.name: folder for folder in run_folders()}


def steps_of(folder: RunFolder) -> int:
    """The last step that a run has recorded."""
    return max((record.step for record in SpoolReader(folder.spool).read() if record.kind == TRAIN), default=0)


def await_steps(name: str, steps: int) -> RunFolder:
    """Wait until the run of this name has taken so many steps."""
    wait_until(lambda: name in folders() and steps_of(folders()[name]) >= steps)
    return folders()[name]


class Driver:
    """A training command that runs; as a context manager it is gone afterwards, with all that it started."""

    def __init__(self, home: Path, *arguments: str, **more: str) -> None:
        self.log = home / "driver.log"
        home.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*_COMMAND, *arguments],
                env=environment(home, **more),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def workers(self) -> list[psutil.Process]:
        """The training workers that are alive, in no order of ranks."""
        return [p for p in self.descendants() if "TrainWorker" in _title(p)]

    def descendants(self) -> list[psutil.Process]:
        """Every process that the command has started, Ray's included."""
        try:
            found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return found

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Send a signal to the driver's whole process group, as a terminal does for Ctrl-C."""
        os.killpg(self.process.pid, number)

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(_DEADLINE_S)

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8")

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        started = self.descendants()
        self.process.kill()
        self.process.wait()
        for process in started:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
