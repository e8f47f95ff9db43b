"""What a sweep leaves behind: the order, the report, and the best configuration as a file that can be trained."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from pipelines.loading import load_config
from pipelines.run_folder import RunFolder
from tests.tuning.sweep_file import RANDOM, begin, end, plan_of
from tuning.sweep_journal import Exploit, SweepJournal
from tuning.sweep_outcome import SweepOutcome, conclude_sweep

SECTIONS: dict[str, Any] = {
    "space": {
        "optimizer.lr": {"kind": "grid", "values": [0.001, 0.01]},
        "stability.clip": {"kind": "choice", "values": [{"kind": "none"}, {"kind": "global", "max_norm": 0.5}]},
    },
    "objective": {"constraints": {"dead_experts": 2.0}},
}
POINTS: list[dict[str, Any]] = [
    {"optimizer.lr": lr, "stability.clip": clip}
    for lr in (0.001, 0.01)
    for clip in ({"kind": "none"}, {"kind": "global", "max_norm": 0.5})
]


class Scene:
    """A sweep's folder and journal; MLflow is not asked for anything when a sweep is concluded."""

    def __init__(self, folder: Path, changes: dict[str, Any]) -> None:
        self.plan = plan_of(folder, changes)
        self.journal = SweepJournal(folder / "sweep" / "trials.jsonl")
        self.run: Any = SimpleNamespace(
            journal=self.journal, folder=RunFolder(folder / "sweep"), info=SimpleNamespace(name="mine-1")
        )

    def trial(self, number: int, loss: float | None, seed: int = 0, **more: Any) -> str:
        name = begin(self.journal, number, seed, POINTS[number], "final" if seed else "search")
        end(self.journal, name, loss, **more)
        return name

    def conclude(self) -> SweepOutcome:
        return conclude_sweep(self.plan, self.run)


def test_a_report_has_the_best_first_and_says_what_became_of_each(tmp_path: Path) -> None:
    scene = Scene(tmp_path, SECTIONS)
    scene.trial(0, 2.0, dead_experts=3.0)
    scene.trial(1, 3.0, dead_experts=1.0)
    scene.trial(2, 5.5, outcome="diverged", step=12)
    scene.trial(3, 4.0, outcome="pruned", step=32)
    begin(scene.journal, 4)  # still at work
    outcome = scene.conclude()
    rows = [line for line in outcome.report().splitlines() if line.startswith("| lr=")]
    assert rows == [
        "| lr=0.001 clip=global(max_norm=0.5) | finished | 1 | 3.0000 | 1 | 100 |",
        "| lr=0.001 clip=none | over a constraint | 1 | 2.0000 | 3 | 100 |",
        "| lr=0.01 clip=global(max_norm=0.5) | pruned | 1 | 4.0000 | - | 32 |",
        "| lr=0.01 clip=none | diverged | 1 | 5.5000 | - | 12 |",
    ]
    assert (scene.run.folder.figures / "ranking.md").read_text() == outcome.report()
    assert scene.run.figures == {
        "sweep/trials": 4,
        "sweep/pruned": 1,
        "sweep/diverged": 1,
        "sweep/steps": 244,
        "sweep/best_val_loss": 3.0,
    }
    table = json.loads((scene.run.folder.figures / "results.json").read_text())
    assert table["columns"] == ["trial", "configuration", "seed", "outcome", "steps", "dead_experts", "val_loss"]
    assert ["trial-02-s0", "lr=0.01 clip=none", 0, "diverged", 12, None, 5.5] in table["data"]
    assert len(table["data"]) == 4
    console = Console(width=200, record=True, quiet=True)
    console.print(outcome.table())


def test_the_best_is_of_the_final_and_its_file_can_be_trained_as_it_is(tmp_path: Path) -> None:
    scene = Scene(tmp_path, {**SECTIONS, "confirm": {"top": 2, "seeds": 2}})
    # The best in the search has had luck; the third was not in the final.
    for number, losses in {0: (2.0, 4.0), 1: (2.5, 2.6), 2: (2.52,)}.items():
        for seed, loss in enumerate(losses):
            scene.trial(number, loss, seed, dead_experts=0.0)
    outcome = scene.conclude()
    assert outcome.best is not None
    assert outcome.best.number == 1
    text = outcome.best_file.read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert header[0] == "# The best configuration of sweep mine-1: a sweep."
    assert "# Validation loss 2.5500 ± 0.0707 nats per token after 100 steps, seeds 0, 1." in header
    assert "# Constraints: dead_experts 0 (at most 2)." in header
    config = load_config([str(outcome.best_file)])
    settings = ["schedule.steps=100", "schedule.warmup_steps=4", "stability.clip={kind: global, max_norm: 0.5}"]
    assert config == load_config(["micro"], [*settings, "optimizer.lr=0.001"])
    assert yaml.safe_load(text)["response"] == config.response.model_dump(mode="json")
    assert config.response.kind != "record"  # which is what trials have


def test_without_one_that_keeps_the_constraints_there_is_no_best(tmp_path: Path) -> None:
    scene = Scene(tmp_path, SECTIONS)
    scene.trial(0, 2.0, dead_experts=3.0)
    scene.trial(1, None, outcome="failed", step=0)
    outcome = scene.conclude()
    assert outcome.best is None
    assert not outcome.best_file.exists()
    assert "sweep/best_val_loss" not in scene.run.figures
    assert scene.run.description.startswith("a sweep, 2 configurations: none finished within the constraints.")


def test_a_best_whose_values_changed_on_the_way_says_so(tmp_path: Path) -> None:
    scene = Scene(tmp_path, {**RANDOM, "scheduler": {"kind": "pbt", "interval_steps": 20}})
    name = begin(scene.journal, 0, values={"optimizer.lr": 0.001})
    scene.journal.add(Exploit(name, "other", 40, {"optimizer.lr": 0.002}))
    end(scene.journal, name, 2.0)
    outcome = scene.conclude()
    text = outcome.best_file.read_text()
    assert "#   step 40: lr=0.002, from the state of other" in text
    assert load_config([str(outcome.best_file)]).optimizer.lr == 0.002


@pytest.mark.parametrize("count", [10, 12])
def test_a_terminal_shows_ten_and_says_how_many_more_there_are(tmp_path: Path, count: int) -> None:
    scene = Scene(tmp_path, RANDOM)
    for number in range(count):
        end(scene.journal, begin(scene.journal, number), 2.0 + number)
    table = scene.conclude().table()
    assert table.row_count == 10
    figures = "losses in nats per token: the mean over seeds ± the standard deviation between them"
    assert table.caption == (figures if count == 10 else f"and 2 more in ranking.md; {figures}")
