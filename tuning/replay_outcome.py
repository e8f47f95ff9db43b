"""What a replay has come to: verdicts, table, picture and report."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from pipelines import spike_words
from pipelines.run_folder import write_json, write_whole
from tuning.replay_figure import draw_replay
from tuning.replay_plan import Plan
from tuning.replay_run import ReplayRun
from tuning.replay_trials import Trial
from tuning.replay_verdict import Verdict, best, cost, judge_replay
from tuning.reproduction import Reproduction, steps_of_timeline
from tuning.treatments import AS_IT_WAS, what_changes

PICTURE, REPORT, TABLE = "replay.png", "report.md", "results.json"

_HEADS = ("treatment", "spike", "score", "peak", "train loss", "val loss", "vs as it was", "vs best")
_HOW_TO_READ = """\
How to read it: all treatments begin with the same state and have the same batches and learning rates, but for what
they change. **avoided**: no event from the spike's onset to the end. Otherwise the detector's highest score tells:
**smaller** (by a fifth at least), **larger** (by a quarter at least) or the **same**; **diverged**: loss or gradient is
not finite; **no effect**: what it changes never acted, and every loss is that of as-it-was, bit for bit. Losses are in
nats per token: the training loss is the mean of the last 10 steps after the event, the validation loss that after the
last step; the last two columns are the validation loss less that of another treatment: as-it-was, and the best. One
seed, one spike: a difference of the losses may be chance."""


@dataclass(frozen=True)
class Row:
    """One treatment in the table."""

    name: str
    says: str
    changes: str
    verdict: Verdict
    score: float | None
    peak: float | None
    train_loss: float | None
    val_loss: float | None
    cost: float | None
    """Validation loss less that of the treatment that changes nothing."""
    to_best: float | None
    """Validation loss less the lowest of all."""

    @property
    def cells(self) -> tuple[str, ...]:
        """For people."""
        return (
            self.name,
            self.verdict,
            _figure(self.score, ".1f"),
            _figure(self.peak, ".4g"),
            _figure(self.train_loss, ".4f"),
            _figure(self.val_loss, ".4f"),
            _figure(self.cost, "+.4f"),
            _figure(self.to_best, "+.4f"),
        )


@dataclass(frozen=True)
class ReplayOutcome:
    """The treatments and whether the first of them is what the run did."""

    plan: Plan
    rows: Sequence[Row]
    reproduction: Reproduction

    @property
    def avoiding(self) -> list[str]:
        """The treatments without a spike."""
        return [row.name for row in self.rows if row.verdict == "avoided"]

    @property
    def sentence(self) -> str:
        """What avoids the spike, in words."""
        others = [row for row in self.rows if row.name != AS_IT_WAS]
        names = [name for name in self.avoiding if name != AS_IT_WAS]
        which = f"{self.plan.event.id} of run {self.plan.run.info.name}"
        if not names:
            return f"None of {len(others)} treatments avoids {which}."
        return f"{', '.join(names)} avoid{'s' if len(names) == 1 else ''} {which}, of {len(others)} treatments."

    def table(self) -> Table:
        """For the terminal."""
        table = Table(title=f"{spike_words.what(self.plan.event)}: treatments", title_justify="left")
        for head in _HEADS:
            table.add_column(head, justify="left" if head in _HEADS[:2] else "right")
        for row in self.rows:
            table.add_row(*row.cells)
        return table

    def report(self) -> str:
        """In Markdown."""
        plan = self.plan
        lines = [
            f"# {plan.event.id} of run {plan.run.info.name}, replayed",
            "",
            f"{self.sentence} The event, {spike_words.what(plan.event)}, was answered so: "
            f"{spike_words.answer(plan.event)}.",
            "",
            f"Steps {plan.start.step + 1:,} to {plan.until:,}, from {plan.start.says}. As it was: "
            f"{self.reproduction.sentence}.",
            "",
            f"![Loss, gradient norm and MaxVio of all treatments]({PICTURE})",
            "",
            f"| {' | '.join(_HEADS)} |",
            f"|{'---|' * len(_HEADS)}",
            *(f"| {' | '.join(row.cells)} |" for row in self.rows),
            "",
            *(f"- `{row.name}`: {row.says}{f' ({row.changes})' if row.changes else ''}" for row in self.rows),
            *(f"- `{name}` was left out: {why}" for name, why in plan.left_out.items()),
            "",
            _HOW_TO_READ,
        ]
        return "\n".join(lines) + "\n"


def conclude_replay(
    plan: Plan, run: ReplayRun, trials: Sequence[Trial], samples: Sequence[int], reproduction: Reproduction
) -> ReplayOutcome:
    """Judge the trials, and leave report, picture and table where the run's end brings them to MLflow.

    ``trials`` begin with that of the treatment that changes nothing.
    """
    lowest = best([trial.measured.val_loss for trial in trials])
    plain = trials[0].measured
    rows = [
        Row(
            trial.arm.name,
            trial.arm.treatment.says,
            what_changes(trial.arm.change, plan.start.step, len(samples)),
            judge_replay(trial.measured, plain),
            trial.measured.score,
            trial.measured.peak,
            trial.measured.train_loss,
            trial.measured.val_loss,
            cost(trial.measured.val_loss, plain.val_loss),
            cost(trial.measured.val_loss, lowest),
        )
        for trial in trials
    ]
    outcome = ReplayOutcome(plan, rows, reproduction)
    figures = run.folder.figures
    courses = {trial.arm.name: steps_of_timeline(trial.folder.spool, 0) for trial in trials}
    draw_replay(plan, steps_of_timeline(plan.run.spool, plan.event.timeline), courses, figures / PICTURE)
    write_whole(figures / REPORT, outcome.report())
    write_json(figures / TABLE, _as_table(rows))
    run.description = f"{outcome.sentence}\n\nAs it was: {reproduction.sentence}."
    run.figures = {
        "replay/treatments": float(len(rows)),
        "replay/avoided": float(len(outcome.avoiding)),
        "replay/reproduced": float(reproduction.is_exact),
    }
    return outcome


def _as_table(rows: Sequence[Row]) -> dict[str, object]:
    """As the MLflow UI reads a table: columns and rows."""
    columns = list(Row.__dataclass_fields__)
    return {"columns": columns, "data": [[getattr(row, column) for column in columns] for row in rows]}


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
