"""Trials on a real Ray cluster: what runs where, and what a killed process, a divergence and a stop cost."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import psutil
import pytest

from moe.config.trainer import ParallelConfig
from pipelines.outcome import Ending
from pipelines.ray_session import connect, worker_environment
from pipelines.run_folder import RunFolder
from pipelines.run_lock import is_written_to
from tests.pipelines.driver import steps_of
from tests.pipelines.mlflow_server import wait_until
from tests.pipelines.small_run import small_config
from tests.tuning.jobs import ABSURD, OTHER, PAIR, by_the_loop, losses_in_series, recorded, rounded, trial_job
from tuning.recording import series_file
from tuning.trial_rank import TrialJob
from tuning.trials import TrialSource, run_trials

pytestmark = pytest.mark.slow

FINISHED = Ending("finished", 12)
# Long enough to be killed in, with a checkpoint to go on from on the way.
LONG = ("schedule.steps=120", "checkpoint.every_steps=30", "validation.every_steps=60")
ENDLESS = ("schedule.steps=1000000",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for everything, and a cluster that all tests share; the process is afterwards as it was."""
    path, environment, on_term = tmp_path_factory.mktemp("trials"), dict(os.environ), signal.getsignal(signal.SIGTERM)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["STEADYMOE_HOME"] = str(path / "home")
    try:
        with connect(worker_environment(small_config())):
            yield path
    finally:
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGTERM, on_term)


def actors(title: str = "") -> dict[int, psutil.Process]:
    """Processes of rank 0 (titled TrainingTrial, at work ResourceTrainable) and of its peers, by their ids."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            words = " ".join(process.cmdline())
            alive = process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
        if alive and words.startswith("ray::") and ("Train" in words or "Peer" in words) and title in words:
            found[process.pid] = process
    return found


class Source(TrialSource):
    """Hands out trials in order and writes down what it is told."""

    def __init__(self, folder: Path, jobs: dict[str, TrialJob]) -> None:
        self.folder, self.jobs = folder, jobs
        self.waiting = list(jobs)
        self.waits: dict[str, str] = {}
        """A trial that is handed out only after another has ended."""
        self.asked_to_wait = 0
        self.on_end: Callable[[str], None] = lambda name: None
        self.starts: dict[str, int] = {}
        self.endings: dict[str, Ending] = {}
        self.failures: dict[str, str] = {}
        self.pids: dict[str, set[int]] = {}
        """Processes that were there when a trial started, by its name."""

    def next(self) -> tuple[str, TrialJob] | Literal["wait", "end"]:
        if not self.waiting:
            return "end"
        if self.waits.get(self.waiting[0], "") not in ("", *self.endings):
            self.asked_to_wait += 1
            return "wait"
        name = self.waiting.pop(0)
        return name, self.jobs[name]

    def started(self, name: str) -> None:
        self.starts[name] = self.starts.get(name, 0) + 1
        self.pids[name] = set(actors())

    def ended(self, name: str, ending: Ending) -> None:
        self.endings[name] = ending
        self.on_end(name)

    def failed(self, name: str, reason: str) -> None:
        self.failures[name] = reason

    def run(self, parallel: ParallelConfig, slots: int, stop: threading.Event | None = None) -> None:
        run_trials(self, parallel, False, slots, self.folder, stop or threading.Event())


def source(folder: Path, trials: dict[str, tuple[str, ...]]) -> Source:
    return Source(folder, {name: trial_job(folder / name, *settings) for name, settings in trials.items()})


def test_short_trials_share_two_processes_and_wait_for_each_other(folder: Path) -> None:
    here = folder / "short"
    trials = source(here, {"a": (), "b": OTHER, "c": OTHER, "d": (), "needs-d": ()})
    trials.waits = {"needs-d": "d"}
    trials.run(ParallelConfig(), slots=2)
    assert trials.endings == dict.fromkeys(trials.jobs, FINISHED)
    assert trials.failures == {}
    assert trials.starts == dict.fromkeys(trials.jobs, 1)
    # A slot that has nothing to do for a while may lose its process.
    assert len(set.union(*(trials.pids[name] for name in "abcd"))) == 2
    assert trials.asked_to_wait > 0
    alone, other = by_the_loop(here / "alone"), by_the_loop(here / "other", *OTHER)
    assert recorded(here / "a") == recorded(here / "d") == recorded(here / "needs-d") == alone
    assert recorded(here / "b") == recorded(here / "c") == other
    assert not (here / "tune").exists()
    wait_until(lambda: actors() == {}, deadline_s=60)


def test_a_stop_leaves_trials_where_they_are_and_no_process_behind(folder: Path) -> None:
    here = folder / "stopped"
    trials = source(here, {"short": (), "endless": ENDLESS, "another": ENDLESS, "never": ()})
    stop = threading.Event()

    def stop_midway() -> None:
        wait_until(lambda: all(steps_of(RunFolder(here / name)) > 20 for name in ("endless", "another")), 200)
        stop.set()

    with ThreadPoolExecutor(1) as aside:
        stopping = aside.submit(stop_midway)
        trials.run(ParallelConfig(), slots=2, stop=stop)
        stopping.result()
    assert trials.endings == {"short": FINISHED}
    assert trials.failures == {}
    assert "never" not in trials.starts
    wait_until(lambda: actors() == {}, deadline_s=60)


def _is_midway(path: Path) -> bool:
    run = RunFolder(path)
    return steps_of(run) >= 50 and not series_file(run).exists() and is_written_to(run)


def test_trials_on_two_ranks_survive_kills_and_a_divergence_bit_for_bit(folder: Path) -> None:
    here = folder / "pairs"
    trials = source(
        here,
        {
            "first": PAIR,
            "absurd": (*PAIR, *ABSURD),
            "after": PAIR,
            "peer-killed": (*PAIR, *LONG),
            "rank-0-killed": (*PAIR, *LONG),
            "last": (*PAIR, *OTHER),
        },
    )

    def kill_midway() -> None:
        victims = {"peer-killed": "Peer", "rank-0-killed": "Train"}
        # In either order: a trial that is restarted may have to wait for others.
        while victims:
            wait_until(lambda: any(_is_midway(here / name) for name in victims), 400)
            name = next(name for name in victims if _is_midway(here / name))
            (process,) = actors(victims.pop(name)).values()
            process.kill()

    def kill_idle(name: str) -> None:
        # The next trial finds it dead when it is to begin.
        if name == "after":
            (process,) = actors("Peer").values()
            process.kill()
            process.wait(60)

    trials.on_end = kill_idle
    parallel = ParallelConfig(workers=2, expert_parallel=2)
    with ThreadPoolExecutor(1) as aside:
        killing = aside.submit(kill_midway)
        trials.run(parallel, slots=1)
        killing.result()
    assert trials.failures == {}
    assert sum(trials.starts.values()) == len(trials.jobs) + 3
    assert trials.endings.pop("absurd").outcome == "diverged"
    long = {name: trials.endings.pop(name) for name in ("peer-killed", "rank-0-killed")}
    assert set(long.values()) == {Ending("finished", 120)}
    assert set(trials.endings.values()) == {FINISHED}
    assert trials.pids["first"] == trials.pids["absurd"] == trials.pids["after"]
    assert len(trials.pids["first"]) == 2

    by = {
        name: by_the_loop(here / f"by-{name}", "parallel.expert_parallel=2", *settings, workers=2)
        for name, settings in {"short": (), "long": LONG, "other": OTHER}.items()
    }
    for name in ("first", "after"):
        assert recorded(here / name) == by["short"], name
    assert recorded(here / "last") == by["other"]
    for name in long:
        assert recorded(here / name) == by["long"], name
        assert losses_in_series(here / name) == rounded(by["long"]["train"])
    wait_until(lambda: actors() == {}, deadline_s=60)
