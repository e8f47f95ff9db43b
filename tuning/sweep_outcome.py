"""What has come of a sweep: the order of its configurations, the best one as a file, a report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

from rich.table import Table

from pipelines.errors import UserError
from pipelines.loading import dump_config
from pipelines.run_folder import RunFolder, write_json, write_whole
from tuning.comparison.comparing import Comparison, compare_runs
from tuning.comparison.findings import findings
from tuning.comparison.page import PAGE, write_report
from tuning.objective import LOSS, Configuration, configurations, ranked
from tuning.sweep_config import PbtSchedulerConfig
from tuning.sweep_journal import SweepJournal
from tuning.sweep_loading import SweepPlan, plain_config
from tuning.sweep_run import JOURNAL, SweepRun

BEST = "best.yaml"
RANKING = "ranking.md"
_ROWS = 10
_FEWEST = 2
_PLUS_MINUS = "losses in nats per token: the mean over seeds ± the standard deviation between them"


@dataclass(frozen=True)
class SweepOutcome:
    """The configurations whose trials are over, the best first."""

    plan: SweepPlan
    name: str
    order: Sequence[Configuration]
    best: Configuration | None
    """None if none finished within the constraints."""
    best_file: Path
    findings: Sequence[str]
    """What the trials show, in sentences."""

    def table(self) -> Table:
        """For the terminal."""
        table = Table(title=f"{self.name}: {len(self.order)} configurations", title_justify="left")
        for column in self._columns():
            table.add_column(column, justify="left" if column in ("configuration", "outcome") else "right")
        for row in self._rows()[:_ROWS]:
            table.add_row(*row)
        more = f"and {len(self.order) - _ROWS} more in {RANKING}; " if len(self.order) > _ROWS else ""
        table.caption = f"{more}{_PLUS_MINUS}"
        return table

    def report(self) -> str:
        """In Markdown."""
        config = self.plan.config
        lines = [f"# {config.title}", "", " ".join(config.question.split()), ""]
        lines += ["| " + " | ".join(self._columns()) + " |", "|" + " --- |" * len(self._columns())]
        lines += ["| " + " | ".join(row) + " |" for row in self._rows()]
        lines += ["", f"{_PLUS_MINUS[0].upper()}{_PLUS_MINUS[1:]}."]
        return "\n".join(lines) + "\n"

    def _columns(self) -> list[str]:
        limits = (f"{name} (≤ {most:g})" for name, most in self.plan.config.objective.constraints.items())
        return ["configuration", "outcome", "seeds", "val loss", *limits, "steps"]

    def _rows(self) -> list[list[str]]:
        objective = self.plan.config.objective
        rows = []
        for one in self.order:
            measures = [one.mean(name) for name in objective.constraints]
            rows.append(
                [
                    self.plan.label(one.values),
                    one.outcome if one.outcome != "finished" or one.is_feasible(objective) else "over a constraint",
                    str(len(one.trials)),
                    _loss_words(one),
                    *("-" if value is None else f"{value:.4g}" for value in measures),
                    f"{max(trial.step for trial in one.trials):,}",
                ]
            )
        return rows


def _loss_words(one: Configuration) -> str:
    losses = [trial.ended.measures[LOSS] for trial in one.trials if trial.ended and LOSS in trial.ended.measures]
    if not losses:
        return "-"
    mean = sum(losses) / len(losses)
    return f"{mean:.4f} ± {stdev(losses):.4f}" if len(losses) > 1 else f"{mean:.4f}"


def conclude_sweep(plan: SweepPlan, run: SweepRun) -> SweepOutcome:
    """Rank what there is, and leave report and best config where the run's end brings them to MLflow."""
    config, trials = plan.config, run.journal.trials.values()
    order, best = _order(plan, run.journal)
    outcome = SweepOutcome(plan, run.info.name, order, best, run.folder.path / BEST, _compare(plan, run))
    write_whole(run.folder.figures / RANKING, outcome.report())
    write_json(run.folder.figures / "results.json", _as_table(plan, order))
    if best is not None:
        text = _evidence(outcome, best) + dump_config(plain_config(config, best.values))
        write_whole(outcome.best_file, text)
        write_whole(run.folder.figures / BEST, text)
    outcomes = [trial.ended.outcome for trial in trials if trial.ended]
    run.description = _description(outcome)
    run.figures = {
        "sweep/trials": float(len(outcomes)),
        "sweep/pruned": float(outcomes.count("pruned")),
        "sweep/diverged": float(outcomes.count("diverged")),
        "sweep/steps": float(sum(trial.ended.step for trial in trials if trial.ended)),
    }
    if best is not None and (loss := best.mean(LOSS)) is not None:
        run.figures["sweep/best_val_loss"] = loss
    return outcome


def _order(plan: SweepPlan, journal: SweepJournal) -> tuple[Sequence[Configuration], Configuration | None]:
    """All configurations whose trials are over, and the best, if there is one."""
    config = plan.config
    # What lost a seed in the final leaves its place to those that were not in it.
    seeds = config.confirm.seeds if config.confirm is not None else 0
    order = ranked(configurations(journal.trials.values()), config.objective, seeds)
    return order, next((one for one in order if one.is_feasible(config.objective)), None)


def _comparable(journal: SweepJournal) -> list[RunFolder]:
    """The runs of the trials that are over and did not fail."""
    over = (trial for trial in journal.trials.values() if trial.ended and trial.ended.outcome != "failed")
    return [folder for folder in (RunFolder(Path(trial.begun.folder)) for trial in over) if folder.is_run]


def compare_trials(plan: SweepPlan, sweep: RunFolder) -> Comparison:
    """The trials of a sweep that are over and did not fail, with its best configuration as the reference.

    Raises:
        UserError: they are fewer than two, or one cannot be read.
    """
    journal = SweepJournal.read(sweep.path / JOURNAL)
    runs = _comparable(journal)
    if len(runs) < _FEWEST:
        raise UserError(f"sweep {sweep.info.name}: fewer than two of its trials have come to an end to be compared at")
    _, best = _order(plan, journal)
    reference = RunFolder(Path(best.trials[0].begun.folder)) if best is not None else None
    limits = [f"{name} at most {most:g}" for name, most in plan.config.objective.constraints.items()]
    within = "the reference is the best within" if best is not None else "nothing finished within"
    told = f" ({within} {', '.join(limits)})" if limits else ""
    changed = any(trial.exploits for trial in journal.trials.values())
    moved = " (values changed on the way: keys are the first ones)" if changed else ""
    return compare_runs(runs, f"Sweep {sweep.info.name}: {plan.config.title}{told}{moved}", reference)


def _compare(plan: SweepPlan, run: SweepRun) -> Sequence[str]:
    """Leave the page of all trials where the run's end brings it to MLflow; what it shows, in sentences."""
    if isinstance(plan.config.scheduler, PbtSchedulerConfig):
        # It would put down to a trial's first values what the last ones did.
        count = sum(len(trial.exploits) for trial in run.journal.trials.values())
        return [f"Values changed on the way, in {count} exploits, so that no loss belongs to one value of a key."]
    if len(_comparable(run.journal)) < _FEWEST:
        return []
    comparison = compare_trials(plan, run.folder)
    write_report(comparison, run.folder.figures / PAGE)
    return findings(comparison)


def _evidence(outcome: SweepOutcome, best: Configuration) -> str:
    """What the file rests on, as comments: a user will meet it without the sweep."""
    plan, objective = outcome.plan, outcome.plan.config.objective
    rivals = [one for one in outcome.order if one is not best and one.outcome == "finished"]
    counts = {kind: sum(one.outcome == kind for one in outcome.order) for kind in ("finished", "pruned", "diverged")}
    lines = [
        f"The best configuration of sweep {outcome.name}: {plan.config.title}.",
        f"{plan.label(best.values)}",
        f"Validation loss {_loss_words(best)} nats per token after {plan.steps:,} steps, "
        f"seeds {', '.join(map(str, best.seeds))}.",
        f"Of {len(outcome.order)} configurations {counts['finished']} finished, {counts['pruned']} were pruned and "
        f"{counts['diverged']} diverged.",
    ]
    if plan.config.confirm is not None and len(best.trials) < (seeds := plan.config.confirm.seeds):
        was_held = any(len(one.trials) >= seeds for one in outcome.order)
        kept_none = f"none of the final kept all constraints with {seeds} seeds"
        lines.append(f"Not confirmed: {kept_none if was_held else 'the final was not held to its end'}.")
    if objective.constraints:
        kept = [
            f"{name} {_measured(best.mean(name))} (at most {most:g})" for name, most in objective.constraints.items()
        ]
        lines.append(f"Constraints: {', '.join(kept)}.")
    if rivals:
        lines.append(f"Next: {plan.label(rivals[0].values)}, {_loss_words(rivals[0])}, {len(rivals[0].seeds)} seed(s).")
    if any(trial.exploits for trial in best.trials):
        lines.append("Its values changed on the way (population based training), and these are the last ones:")
        lines += [
            f"  step {exploit.step}: {plan.label(exploit.values)}, from the state of {exploit.donor}"
            for trial in best.trials
            for exploit in trial.exploits
        ]
    return "".join(f"# {line}\n" for line in lines)


def _measured(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _as_table(plan: SweepPlan, order: Sequence[Configuration]) -> dict[str, object]:
    """As the MLflow UI reads a table: columns and rows."""
    ended = [trial.ended for one in order for trial in one.trials if trial.ended]
    measures = sorted({name for trial in ended for name in trial.measures} - {"steps"})
    rows = [
        [trial.begun.name, plan.label(one.values), trial.begun.seed, trial.ended.outcome, trial.ended.step]
        + [trial.ended.measures.get(name) for name in measures]
        for one in order
        for trial in one.trials
        if trial.ended
    ]
    return {"columns": ["trial", "configuration", "seed", "outcome", "steps", *measures], "data": rows}


def _description(outcome: SweepOutcome) -> str:
    """First a plain sentence: lists show no more."""
    plan, best = outcome.plan, outcome.best
    found = f"best {_loss_words(best)} at {plan.label(best.values)}" if best else "none finished within the constraints"
    told = "".join(f"\n- {sentence}" for sentence in outcome.findings)
    return f"{plan.config.title}, {len(outcome.order)} configurations: {found}.\n\n{plan.config.question}\n{told}"
