"""``steadymoe study``: the arms of a claim over paired seeds, as trials on Ray Tune under one MLflow parent."""

import hashlib
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pipelines.command_line import EXIT_DONE, EXIT_INTERRUPTED, run_command
from pipelines.config import RunConfig, TrackingConfig
from pipelines.home import refuse_unwritable_home
from pipelines.interrupts import Interrupts
from pipelines.job import run_in_job
from pipelines.loading import dump_config
from pipelines.orphans import end_orphaned_parents, end_orphans_in_background
from pipelines.progress import clock
from pipelines.ray_session import ray_session, refuse_impossible_cluster, runs_at_a_time, uses_gpu, worker_environment
from pipelines.run_folder import RunFolder
from pipelines.shards import Shards
from pipelines.summary import print_links
from pipelines.text import fit_to_text, prepare_shown
from pipelines.tracking_store import TrackingStore, open_store_in_background, tracking_uri
from pipelines.views import STUDIES
from tuning import commands
from tuning.arguments import StudyArguments
from tuning.blocks import Blocks, blocks_of
from tuning.cost import Cost, block_cost
from tuning.driving import run_to_end, say_what_is_untold
from tuning.outcome import Outcome, conclude
from tuning.parent_run import Stopwatch
from tuning.results import TrialResult
from tuning.study_config import StudyConfig
from tuning.study_loading import load_study, trial_configs
from tuning.study_progress import StudyProgress
from tuning.study_run import StudyRun, find_study, read_trials
from tuning.study_trials import StudyTrials
from tuning.trials import run_trials


def run(arguments: StudyArguments) -> int:
    """One study, new or resumed; returns the exit code.

    Raises:
        UserError: the study, its text, the tracking store or the cluster do not allow it.
        RuntimeError: a trial failed for good.
    """
    console = Console()
    resumed = find_study(arguments.resume) if arguments.resume is not None else None
    study = load_study(str(resumed.config) if resumed else arguments.study[0], arguments.settings, **arguments.changed)
    refuse_unwritable_home()
    configs = trial_configs(study)
    refuse_impossible_cluster(configs[0])
    shards = prepare_shown(configs[0].data, console)
    configs = [fit_to_text(config, shards) for config in configs]
    done = [trial.key for trial in read_trials(resumed)] if resumed else []
    opening = open_store_in_background(tracking_uri(configs[0].tracking, resumed.info if resumed else None))
    _print(console, f"{study.title}: {' '.join(study.question.split())}")
    with ExitStack() as stack:
        interrupts, cost = None, None
        if not all(key in done for block in blocks_of(study) for key in block):
            _print(console, "starting Ray ...")
            interrupts = stack.enter_context(Interrupts())
            stack.enter_context(ray_session(configs[0], worker_environment(configs[0])))
            cost = block_cost(configs, shards, runs_at_a_time(configs[0]))
            _print(console, _in_words(study, cost))
        store = opening.result()
        end_orphaned_parents(store)
        end_orphans_in_background(store)
        study_run = _open(arguments, study, configs, store, resumed)
        stopped = False
        with study_run:
            if interrupts is not None and cost is not None:
                stopped = _run(_Setting(study, study_run, shards, configs[0], store, cost), interrupts, console)
            outcome = conclude(study, study_run, configs[0])
            if stopped:
                study_run.status = "KILLED"
    return _tell(arguments, study_run, outcome, stopped, console)


def _open(
    arguments: StudyArguments,
    study: StudyConfig,
    configs: list[RunConfig],
    store: TrackingStore,
    resumed: RunFolder | None,
) -> StudyRun:
    content = "\n".join(dump_config(config.model_copy(update={"tracking": TrackingConfig()})) for config in configs)
    digest = hashlib.sha256(content.encode()).hexdigest()
    if resumed is not None:
        return StudyRun.reopen(study, store, resumed, digest)
    name = Path(arguments.study[0]).stem
    return StudyRun.start(study, store, name, configs[0].tracking.experiment, digest)


@dataclass(frozen=True)
class _Setting:
    """What a study runs with."""

    study: StudyConfig
    run: StudyRun
    shards: Shards
    config: RunConfig
    store: TrackingStore
    cost: Cost


def _run(setting: _Setting, interrupts: Interrupts, console: Console) -> bool:
    """Run blocks as long as the budget goes; whether the user stopped it."""
    study, study_run, cost = setting.study, setting.run, setting.cost
    stop, asked = threading.Event(), False
    blocks = Blocks(study, cost.slots, cost.seconds_per_trial, done=[trial.key for trial in study_run.trials])
    stopwatch = Stopwatch(study_run.progress)
    with StudyProgress(study, blocks, console) as progress:

        def trial_ended(result: TrialResult, seconds: float) -> None:
            # Each time, for a killed driver has no last word.
            stopwatch.note()
            progress.trial_ended(result, seconds)

        trials = StudyTrials(study, study_run, blocks, setting.shards, setting.store, stop, trial_ended)

        def ask() -> bool:
            nonlocal asked
            asked = True
            stop.set()
            progress.say("Stopping; trials that are not finished will be begun anew. A second time ends it at once.")
            return True

        def work() -> None:
            parallel = setting.config.parallel
            run_trials(trials, parallel, uses_gpu(setting.config), cost.slots, study_run.folder.path, stop)

        def close() -> None:
            trials.close()
            stopwatch.note()

        run_to_end(work, interrupts, ask, close)
    say_what_is_untold(trials.untold, console)
    if trials.failure is not None:
        raise trials.failure
    return asked


def _in_words(study: StudyConfig, cost: Cost) -> str:
    blocks = max(1, min(study.blocks, int(60 * study.budget_minutes // cost.seconds)))
    return (
        f"a block is {cost.trials} trials, {cost.steps:,} steps and {cost.tokens / 1e6:.1f} M tokens in all, "
        f"about {clock(cost.seconds)} with {cost.slots} at a time; "
        f"the budget of {study.budget_minutes:g} minutes holds about {blocks} of at most {study.blocks} blocks"
    )


def _tell(arguments: StudyArguments, study_run: StudyRun, outcome: Outcome, stopped: bool, console: Console) -> int:
    console.print()
    console.print(outcome.table())
    if arguments.findings is not None:
        outcome.write_findings(Path(arguments.findings))
        _print(console, f"written into {arguments.findings}")
    print_links(study_run.folder, STUDIES, console)
    if study_run.undelivered:
        _print(console, study_run.undelivered)
    if stopped:
        _print(console, f"The study ended early. To go on: steadymoe study --resume {study_run.info.name}")
        return EXIT_INTERRUPTED
    return EXIT_DONE


def _print(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command without the rest of the command line."""
    return run_command(StudyArguments, commands.study, argv, "python -m tuning.study")


if __name__ == "__main__":
    sys.exit(run_in_job(main))
