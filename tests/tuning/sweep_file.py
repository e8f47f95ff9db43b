"""A sweep that is right, as the tree of its file, for tests to change; and what its trials have done, as a journal."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.yaml_text import dump
from tuning.sweep_journal import Begun, Ended, SweepJournal, TrialOutcome
from tuning.sweep_loading import SweepPlan, load_sweep

GRID: dict[str, Any] = {"optimizer.lr": {"kind": "grid", "values": [0.001, 0.01]}}
RATES: dict[str, Any] = {"optimizer.lr": {"kind": "log_uniform", "low": 1e-4, "high": 1e-2}}
SWEEP: dict[str, Any] = {
    "title": "a sweep",
    "question": "which?",
    "base": ["micro"],
    "config": {"schedule": {"steps": 100, "warmup_steps": 4}},
    "space": GRID,
}
RANDOM: dict[str, Any] = {"space": RATES, "searcher": {"kind": "random"}, "budget": {"trials": 8}}
TPE: dict[str, Any] = {**RANDOM, "searcher": {"kind": "tpe", "startup_trials": 4}}


def write_sweep(folder: Path, changes: Mapping[str, Any]) -> str:
    """The sweep with some keys in place of its own, as ``mine.yaml``; None takes a key out."""
    tree = {key: value for key, value in {**copy.deepcopy(SWEEP), **changes}.items() if value is not None}
    path = folder / "mine.yaml"
    path.write_text(dump(tree))
    return str(path)


def plan_of(folder: Path, changes: Mapping[str, Any]) -> SweepPlan:
    """The plan of that sweep."""
    return load_sweep(write_sweep(folder, changes))


def begin(journal: SweepJournal, number: int, seed: int = 0, values: Any = None, phase: Any = "search") -> str:
    """A trial that the journal hears of; returns its name."""
    name = f"trial-{number:02d}-s{seed}"
    journal.add(Begun(name, number, seed, values or {"optimizer.lr": 0.001 * (number + 1)}, phase, f"/runs/{name}"))
    return name


def end(
    journal: SweepJournal,
    name: str,
    loss: float | None,
    outcome: TrialOutcome = "finished",
    step: int = 100,
    seconds: float = 10.0,
    reason: str | None = None,
    resumed: bool = False,
    **measures: float,
) -> None:
    """Its end."""
    known = {} if loss is None else {"val_loss": loss}
    journal.add(Ended(name, outcome, step, seconds, {**known, **measures}, reason, resumed))
