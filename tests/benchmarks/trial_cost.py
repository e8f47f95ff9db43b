"""What a trial of a sweep costs besides its training, and what one costs that diverges at once.

    python -m tests.benchmarks.trial_cost [FULL_TRIALS]

Two sweeps of the preset micro, with one and with two workers per trial, on a single slot: half of the trials come to
their 200 steps, the loss of the others is not finite from step 5 on. The wall time of a trial is that between its line
of the output and the line before it, and its fixed cost is that without its steps and validations: what the processes,
the driver, Tune and MLflow take. The first trial of the slot, which starts the processes, is left out.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from pipelines.run_folder import RunFolder, find_sweep
from pipelines.spool import TRAIN, VALIDATION, SpoolReader
from tests.infra.local_cluster import PROGRAM
from tests.pipelines.driver import environment
from tuning.recording import read_series
from tuning.sweep_journal import SweepJournal, TrialOutcome
from tuning.sweep_run import JOURNAL

STEPS, DIVERGES_AT = 200, 5
# The bars: seconds of a trial that are not training, and the share of a full trial that a diverged one may cost.
MOST_SECONDS, MOST_SHARE = 0.5, 0.15
_LINE = re.compile(r"^\[\d+/\d+\] ")


@dataclass(frozen=True)
class Cost:
    """Seconds of a trial."""

    outcome: TrialOutcome
    wall: float
    training: float
    """Of its steps and validations, with what is recorded of each."""


def sweep_file(folder: Path, full: int) -> Path:
    """A sweep of ``full`` trials that finish, and as many that do not."""
    blow_up = {"kind": "weight_scaled", "step": DIVERGES_AT, "group": "dense", "factor": 1e30}
    sweep: dict[str, Any] = {
        "title": "What a trial costs",
        "question": "How long are the pauses?",
        "base": ["micro"],
        "config": {"schedule": {"steps": STEPS}},
        "space": {
            "optimizer.lr": {"kind": "grid", "values": [round(1e-3 * (1 + 0.1 * n), 6) for n in range(full)]},
            "faults": {"kind": "choice", "values": [[], [blow_up]]},
        },
        "concurrent": 1,
    }
    path = folder / "cost.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def costs(home: Path, file: Path, *settings: str) -> Iterator[Cost]:
    """Run the sweep; the costs of its trials but the first, in their order."""
    command = [*PROGRAM, "sweep", str(file), *(word for setting in settings for word in ("--set", setting))]
    moments = []
    with subprocess.Popen(
        command, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        assert driver.stdout is not None
        lines = []
        for line in driver.stdout:
            lines.append(line)
            if _LINE.match(line):
                moments.append(time.monotonic())
    if driver.returncode:
        sys.exit("".join(lines))
    trials = list(SweepJournal.read(find_sweep("latest").path / JOURNAL).trials.values())
    for trial, before, after in zip(trials[1:], moments[:-1], moments[1:], strict=True):
        assert trial.ended is not None
        yield Cost(trial.ended.outcome, after - before, training_seconds(RunFolder(Path(trial.begun.folder))))


def training_seconds(folder: RunFolder) -> float:
    """Seconds from the beginning of a trial's first step to the record of its last step or validation."""
    records = [record for record in SpoolReader(folder.spool).read() if record.kind in (TRAIN, VALIDATION)]
    first = read_series(folder).train["train/step_seconds"][0]
    return first + (records[-1].time_ms - records[0].time_ms) / 1000


def row(workers: int, found: list[Cost]) -> str:
    """A line of the table."""
    full = [cost for cost in found if cost.outcome == "finished"]
    diverged = [cost for cost in found if cost.outcome == "diverged"]
    fixed = [cost.wall - cost.training for cost in full]
    wall = median(cost.wall for cost in full)
    shares = [cost.wall / wall for cost in diverged]
    return (
        f"{workers:>7} {len(full):>5} {wall:>7.2f} s {median(fixed):>8.2f} s {max(fixed):>8.2f} s "
        f"{len(diverged):>9} {median(shares):>8.1%} {max(shares):>8.1%}"
    )


def main(full: int) -> None:
    """Run the benchmark and print the table."""
    print(f"bars: fixed cost {MOST_SECONDS} s, diverged at step {DIVERGES_AT} of {STEPS} {MOST_SHARE:.0%}")
    print(f"{'workers':>7} {'full':>5} {'wall':>9} {'fixed':>10} {'largest':>10} {'diverged':>9} {'share':>8} {'largest':>8}")  # fmt: skip  # noqa: E501
    with tempfile.TemporaryDirectory(prefix="trial-cost-") as folder:
        os.environ["STEADYMOE_HOME"] = folder
        file = sweep_file(Path(folder), full)
        for workers in (1, 2):
            pair = (f"parallel.workers={workers}", f"parallel.expert_parallel={workers}")
            before = os.getloadavg()[0]
            found = list(costs(Path(folder), file, *pair))
            load = f"load {before:.1f} to {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
            print(f"{row(workers, found)}  ({load})", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
