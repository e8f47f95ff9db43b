"""What a user sees while a sweep runs."""

import io
import threading
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.pipelines.mlflow_server import wait_until
from tests.tuning.sweep_file import begin, end, plan_of
from tuning.sweep_journal import SweepJournal
from tuning.sweep_progress import SweepProgress
from tuning.sweep_queue import SweepQueue

FOUR: dict[str, Any] = {"space": {"optimizer.lr": {"kind": "grid", "values": [0.001, 0.002, 0.003, 0.004]}}}


def test_every_trial_that_ends_has_a_line_with_how_many_there_are_and_the_best_so_far(tmp_path: Path) -> None:
    plan, journal = plan_of(tmp_path, FOUR), SweepJournal(tmp_path / "trials.jsonl")
    queue, out, steps = SweepQueue(plan, journal, 2, 1000, 0.0), io.StringIO(), dict[str, int]()

    with SweepProgress(plan, journal, queue, steps, Console(file=out, width=200)) as progress:

        def ended(number: int, *arguments: Any, **more: Any) -> None:
            name = names[number]
            end(journal, name, *arguments, **more)
            steps.pop(name, None)
            known = journal.trials[name]
            assert known.ended is not None
            progress.trial_ended(plan.label(known.values), known.ended)

        names = [begin(journal, number) for number in (0, 1)]
        steps.update(dict.fromkeys(names, 5))
        ended(1, 5.5, "diverged", step=9)
        # One that waits for its slot is there as well.
        names.append(begin(journal, 2))
        ended(0, 3.25, seconds=12.4)
        names.append(begin(journal, 3))
        ended(2, 4.0, "pruned", step=32)
        ended(3, None, "failed", step=0, reason="trial d failed: its actors died")
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert lines == [
        "[1/4] lr=0.002 val 5.5000 DIVERGED 10 s none finished yet",
        "[2/4] lr=0.001 val 3.2500 12 s best 3.2500 at lr=0.001",
        "[3/4] lr=0.003 val 4.0000 pruned at 32 10 s best 3.2500 at lr=0.001",
        "[4/4] lr=0.004 val - FAILED 10 s best 3.2500 at lr=0.001",
        "trial d failed: its actors died",
    ]


def test_a_finalist_whose_further_seed_runs_stays_the_best(tmp_path: Path) -> None:
    plan, journal = plan_of(tmp_path, FOUR), SweepJournal(tmp_path / "trials.jsonl")
    queue, out = SweepQueue(plan, journal, 2, 1000, 0.0), io.StringIO()
    for number, loss in enumerate((2.0, 3.0, 4.0, 5.0)):
        end(journal, begin(journal, number), loss)
    begin(journal, 0, seed=1, phase="final")
    name = begin(journal, 1, seed=1, phase="final")
    end(journal, name, 3.5)
    with SweepProgress(plan, journal, queue, {}, Console(file=out, width=200)) as progress:
        known = journal.trials[name]
        assert known.ended is not None
        progress.trial_ended(plan.label(known.values), known.ended)
    assert out.getvalue().rstrip().endswith("best 2.0000 at lr=0.001")


def test_a_best_that_exceeds_a_constraint_is_called_so_and_seeds_are_told_apart(tmp_path: Path) -> None:
    changes = {**FOUR, "objective": {"constraints": {"dead_experts": 1.0}}, "confirm": {"top": 2, "seeds": 2}}
    plan, journal = plan_of(tmp_path, changes), SweepJournal(tmp_path / "trials.jsonl")
    queue, out = SweepQueue(plan, journal, 2, 1000, 0.0), io.StringIO()
    with SweepProgress(plan, journal, queue, {}, Console(file=out, width=200)) as progress:
        for number, dead in enumerate((3.0, 0.0)):
            name = begin(journal, number)
            end(journal, name, 2.0 + number, dead_experts=dead)
            known = journal.trials[name]
            assert known.ended is not None
            progress.trial_ended(plan.label(known.values), known.ended)
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert lines == [
        "[1/6] lr=0.001 seed 0 val 2.0000 10 s best 2.0000 (over a constraint) at lr=0.001",
        "[2/6] lr=0.002 seed 0 val 3.0000 10 s best 3.0000 at lr=0.002",
    ]


def test_a_log_says_now_and_then_that_trials_run(tmp_path: Path) -> None:
    plan, journal = plan_of(tmp_path, FOUR), SweepJournal(tmp_path / "trials.jsonl")
    queue, out = SweepQueue(plan, journal, 2, 1000, 60.0, lambda: 0.0), io.StringIO()
    steps: dict[str, int] = {}
    with SweepProgress(plan, journal, queue, steps, Console(file=out, width=200), line_latest_s=0.05):
        wait_until(lambda: bool(out.getvalue()), 10)
        steps[begin(journal, 0)] = 12
        begin(journal, 1)
        wait_until(lambda: "trial-01" in out.getvalue(), 10)
    lines = out.getvalue().splitlines()
    assert lines[0] == "1:00 so far, 4 trials to begin: no trial runs yet"
    assert lines[-1] == "1:00 so far, 2 trials to begin: trial-00-s0 step 12 of 100, trial-01-s0 starts"
    # Nobody speaks after the end.
    assert "sweep-progress" not in {thread.name for thread in threading.enumerate()}


def test_a_terminal_shows_what_runs_the_best_three_and_what_is_left(tmp_path: Path) -> None:
    plan, journal = plan_of(tmp_path, FOUR), SweepJournal(tmp_path / "trials.jsonl")
    now = 0.0
    queue = SweepQueue(plan, journal, 1, 1000, 60.0, lambda: now)
    for number, loss in enumerate((3.0, 2.0)):
        end(journal, begin(journal, number), loss, seconds=90.0)
    steps = {begin(journal, 2): 40}
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    with SweepProgress(plan, journal, queue, steps, console):
        pass
    text = out.getvalue()
    shown = [" ".join(line.split()) for line in text.splitlines()]
    assert any("runs trial-02-s0 step 40 of 100 lr=0.003" in line for line in shown)
    assert any(line.startswith("1. val 2.0000 1 seed(s) lr=0.002") for line in shown)
    assert any(line.startswith("2. val 3.0000 1 seed(s) lr=0.001") for line in shown)
    # One to begin and one that has come to 40 of 100 steps, of 90 seconds each.
    assert any("1:00 so far, 1 trials to begin, about 2:24 left" in line for line in shown)
