"""What a study has come to: measures of its trials, verdicts, report and picture."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from pipelines.config import RunConfig
from pipelines.environment import cores, cpu_name
from pipelines.faults.batches import corrupted_steps
from pipelines.history import History
from pipelines.journal import Journal
from pipelines.run_folder import RunFolder, write_json, write_whole
from pipelines.spike_event import read_events, steps_lost
from pipelines.token_table import TokenTable
from tuning.measures import measure
from tuning.recording import read_series
from tuning.report import Effort, replace_section, write_report
from tuning.results import Results, TrialKey, TrialResult
from tuning.study_config import StudyConfig
from tuning.study_figure import draw_study
from tuning.study_loading import trial_config
from tuning.study_run import StudyRun
from tuning.token_allocation import complexity, picks_of, spread
from tuning.verdict import ClaimVerdict, judge

PICTURE = "study.png"


def measure_trial(folder: RunFolder, config: RunConfig) -> dict[str, float]:
    """The measures of a trial from what it left in its folder, but for those that take other trials."""
    measures = measure(read_series(folder), config, corrupted_steps(config)) | _of_events(folder)
    if config.model.moe.num_experts and folder.tokens.exists():
        measures["real_experts_spread"] = spread(TokenTable.read(folder.tokens).experts_T, picks_of(config.model))
    return measures


def measure_pruned(folder: RunFolder, loss: float) -> dict[str, float]:
    """The measures that a trial has which was ended at a validation of this loss; all finite."""
    measures = {"val_loss": loss, "diverged": 0.0} | _of_events(folder)
    last = History.read(folder.spool).last("moe/max_vio_global")
    return measures if last is None else {**measures, "max_vio_global": last}


def _of_events(folder: RunFolder) -> dict[str, float]:
    journal = Journal.read(folder.journal)
    return {
        "spikes_left": float(len(journal.decisions)),
        "steps_lost": float(steps_lost(read_events(folder.events))),
    }


def complexities(reference: str, folders: Mapping[TrialKey, RunFolder]) -> dict[TrialKey, float]:
    """``token_complexity`` of each trial: its experts against the losses of the reference arm of the next seed.

    After the last seed comes the first. A trial without figures of tokens has none, nor has any with a single seed.
    """
    seeds = sorted({key.seed for key in folders})
    others = dict(zip(seeds, [*seeds[1:], *seeds[:1]], strict=True)) if len(seeds) > 1 else {}
    found = {}
    for key, folder in folders.items():
        judge_folder = folders.get(TrialKey(others[key.seed], reference, key.point)) if key.seed in others else None
        if judge_folder is not None and folder.tokens.exists() and judge_folder.tokens.exists():
            own, hard = TokenTable.read(folder.tokens), TokenTable.read(judge_folder.tokens)
            found[key] = complexity(own.ids_T, own.experts_T, hard.losses_T)
    return found


@dataclass(frozen=True)
class Outcome:
    """The results and what they say."""

    study: StudyConfig
    name: str
    results: Results
    verdicts: list[ClaimVerdict]
    effort: Effort
    picture: Path

    def table(self) -> Table:
        """The verdicts for the terminal."""
        table = Table(title=f"{self.name}: {len(self.results.seeds)} blocks", title_justify="left")
        for column in ("claim", "verdict", "figures"):
            table.add_column(column)
        for verdict in self.verdicts:
            lines = [condition.sentence for condition in verdict.conditions]
            table.add_row(verdict.claim.name, verdict.verdict, "\n".join([*filter(None, [verdict.reason]), *lines]))
        return table

    def report(self, picture: str) -> str:
        """The study's section in Markdown; ``picture`` is the link to its picture."""
        return write_report(self.study, self.results, self.verdicts, self.effort, picture)

    def write_findings(self, file: Path) -> None:
        """Write the study's section into a Markdown file, and its picture beside it."""
        name = self.name.rpartition("-")[0]
        picture = file.with_name(f"{file.stem}-{name}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(self.picture.read_bytes())
        replace_section(file, name, self.report(picture.name))


def conclude(study: StudyConfig, run: StudyRun, config: RunConfig) -> Outcome:
    """Judge what there is, and leave report, picture and figures where the run's end brings them to MLflow."""
    trials = []
    # By seed and arm, and not as they happened to end: a study that was interrupted has the same files.
    for record in sorted(run.trials, key=lambda record: record.key):
        trial = trial_config(study, record.key, record.matched)
        trials.append(TrialResult(record.key, measure_trial(RunFolder(Path(record.folder)), trial)))
    if study.reference is not None:
        folders = {record.key: RunFolder(Path(record.folder)) for record in run.trials}
        found = complexities(study.reference, folders)
        trials = [_with(trial, "token_complexity", found.get(trial.key)) for trial in trials]
    results = Results(trials, study.arms, study.points())
    verdicts = judge(study, results)
    tokens = config.steps * config.data.global_batch_size * config.data.sequence_length
    effort = Effort(
        run.progress.minutes,
        config.steps,
        tokens,
        f"{cpu_name()}, {cores()} cores; {config.parallel.workers} worker(s) a trial",
    )
    figures = run.folder.figures
    outcome = Outcome(study, run.info.name, results, verdicts, effort, figures / PICTURE)
    draw_study(study, results, verdicts, outcome.picture)
    write_whole(figures / "report.md", outcome.report(PICTURE))
    write_json(figures / "results.json", _as_table(trials))
    run.description = _description(study, results, verdicts)
    run.figures = {"study/blocks": float(len(results.seeds)), "study/trials": float(len(trials))}
    return outcome


def _with(trial: TrialResult, name: str, value: float | None) -> TrialResult:
    return trial if value is None else replace(trial, measures={**trial.measures, name: value})


def _as_table(trials: list[TrialResult]) -> dict[str, object]:
    """As the MLflow UI reads a table: columns and rows."""
    measures = sorted({name for trial in trials for name in trial.measures})
    rows = [
        [t.key.arm, t.key.point, t.key.seed, *(t.measures.get(name, math.nan) for name in measures)] for t in trials
    ]
    return {"columns": ["arm", "point", "seed", *measures], "data": rows}


def _description(study: StudyConfig, results: Results, verdicts: list[ClaimVerdict]) -> str:
    """First a plain sentence: lists show no more."""
    counts = ", ".join(f"{verdict.claim.name} {verdict.verdict}" for verdict in verdicts)
    return f"{study.title}, {len(results.seeds)} blocks: {counts}.\n\n{study.question}"
