"""``steadymoe sweep``: a search space, as trials on Ray Tune under one MLflow parent."""

import hashlib
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from pipelines.checkpoint_manifest import checkpoint_folders, step_of
from pipelines.command_line import EXIT_DEFECT, EXIT_DONE, EXIT_INTERRUPTED, run_command
from pipelines.config import RunConfig, TrackingConfig
from pipelines.errors import UserError
from pipelines.home import refuse_unwritable_home
from pipelines.interrupts import Interrupts
from pipelines.job import run_in_job
from pipelines.loading import dump_config
from pipelines.orphans import end_orphaned_parents, end_orphans
from pipelines.ray_session import ray_session, refuse_impossible_cluster, runs_at_a_time, uses_gpu, worker_environment
from pipelines.run_folder import RunFolder, find_sweep
from pipelines.saved_view import View
from pipelines.shards import Shards
from pipelines.spike_words import counted
from pipelines.summary import print_links
from pipelines.sweep_view import sweep_view
from pipelines.terminal import list_console, print_line
from pipelines.text import fit_to_text, prepare_shown
from pipelines.tracking_store import TrackingStore, open_store_in_background, tracking_uri
from pipelines.view_publishing import publish_sweep_view
from tuning import commands
from tuning.arguments import SweepArguments
from tuning.comparison.page import PAGE
from tuning.driving import run_to_end, say_what_is_untold
from tuning.parent_run import Stopwatch
from tuning.sweep_config import AshaSchedulerConfig, PbtSchedulerConfig, SweepConfig
from tuning.sweep_journal import Ended
from tuning.sweep_loading import SweepPlan, load_sweep, trial_config
from tuning.sweep_outcome import SweepOutcome, conclude_sweep
from tuning.sweep_progress import SweepProgress
from tuning.sweep_queue import SweepQueue
from tuning.sweep_run import SweepRun
from tuning.sweep_trials import SweepTrials
from tuning.trials import run_trials

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler


def run(arguments: SweepArguments) -> int:
    """One sweep, new or resumed; returns the exit code.

    Raises:
        UserError: the sweep, its text, the tracking store or the cluster do not allow it, or no config could be used.
    """
    console = list_console()
    resumed = find_sweep(arguments.resume) if arguments.resume is not None else None
    plan = load_sweep(str(resumed.config) if resumed else arguments.sweep[0], arguments.settings, **arguments.changed)
    refuse_unwritable_home()
    config = trial_config(plan, plan.probe, plan.first_seed)
    refuse_impossible_cluster(config)
    shards = prepare_shown(config.data, console)
    config = fit_to_text(config, shards)
    opening = open_store_in_background(tracking_uri(config.tracking, resumed.info if resumed else None))
    print_line(console, f"{plan.config.title}: {' '.join(plan.config.question.split())}")
    print_line(console, "starting Ray ...")
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        stack.enter_context(ray_session(config, worker_environment(config)))
        slots = _slots(plan.config, config)
        print_line(console, _in_words(plan, config, slots))
        store = opening.result()
        end_orphaned_parents(store)
        end_orphans(store, spared=resumed.info.id if resumed else None)
        sweep_run = _open(arguments, plan, config, store, resumed)
        over = sum(trial.ended is not None for trial in sweep_run.journal.trials.values())
        already = f", {counted(over, 'trial')} over already" if resumed else ""
        print_line(console, f"sweep {sweep_run.info.name}{already}")
        view = sweep_view(sweep_run.info.id, sweep_run.info.name, plan.keys)
        publish_sweep_view(store.client, sweep_run.info.experiment_id, view)
        early = f"The sweep ended early. To go on: steadymoe sweep --resume {sweep_run.info.name}"
        try:
            with sweep_run:
                stopped, failure = _run(_Setting(plan, sweep_run, shards, config, store, slots), interrupts, console)
                # All trials are over: it takes seconds, and is worth them.
                outcome = interrupts.wait(lambda: conclude_sweep(plan, sweep_run), lambda: True)
                if failure is not None:
                    sweep_run.status = "FAILED"
                elif stopped:
                    sweep_run.status = "KILLED"
        except KeyboardInterrupt:
            print_line(console, early)
            raise
    _tell(sweep_run, outcome, view, console)
    if stopped or failure is not None:
        print_line(console, early)
    if isinstance(failure, UserError):
        raise failure
    if failure is not None:
        print(f"error: {failure}", file=sys.stderr)
        return EXIT_DEFECT
    return EXIT_INTERRUPTED if stopped else EXIT_DONE


def _slots(sweep: SweepConfig, config: RunConfig) -> int:
    """Trials at a time. UserError if the cluster cannot hold what is asked for. Needs a session."""
    fit, parallel = runs_at_a_time(config), config.parallel
    if sweep.concurrent is not None and sweep.concurrent > fit:
        ranks = sweep.concurrent * parallel.workers
        gpus = f" and {ranks} GPUs" if uses_gpu(config) else ""
        raise UserError(
            f"concurrent: {sweep.concurrent} trials x parallel.workers ({parallel.workers}) x parallel.threads "
            f"({parallel.threads}) are {ranks * parallel.threads} CPUs{gpus}, and the cluster holds {fit} such trials "
            "at a time; leave it out"
        )
    return sweep.concurrent or fit


def _open(
    arguments: SweepArguments, plan: SweepPlan, config: RunConfig, store: TrackingStore, resumed: RunFolder | None
) -> SweepRun:
    content = dump_config(config.model_copy(update={"tracking": TrackingConfig()}))
    digest = hashlib.sha256(content.encode()).hexdigest()
    if resumed is not None:
        return SweepRun.reopen(plan.config, store, resumed, digest)
    return SweepRun.start(plan.config, store, Path(arguments.sweep[0]).stem, config.tracking.experiment, digest)


@dataclass(frozen=True)
class _Setting:
    """What a sweep runs with."""

    plan: SweepPlan
    run: SweepRun
    shards: Shards
    config: RunConfig
    store: TrackingStore
    slots: int


def _run(setting: _Setting, interrupts: Interrupts, console: Console) -> tuple[bool, Exception | None]:
    """Run trials as long as the budget goes; whether the user stopped it, and why it cannot go on, if so."""
    plan, sweep_run, config = setting.plan, setting.run, setting.config
    stop, asked = threading.Event(), False
    per_step = config.data.global_batch_size * config.data.sequence_length
    queue = SweepQueue(plan, sweep_run.journal, setting.slots, per_step, 60 * sweep_run.progress.minutes)
    steps: dict[str, int] = {}
    clock = Stopwatch(sweep_run.progress)
    # A population takes turns in the slots: its trials must all be there to be compared.
    population = plan.config.budget.trials if isinstance(plan.config.scheduler, PbtSchedulerConfig) else None
    with SweepProgress(plan, sweep_run.journal, queue, steps, console) as progress:

        def trial_ended(label: str, ended: Ended) -> None:
            # Each time, for a killed driver has no last word.
            clock.note()
            progress.trial_ended(label, ended)

        trials = SweepTrials(
            plan,
            sweep_run,
            queue,
            setting.shards,
            setting.store,
            stop,
            population or setting.slots,
            steps,
            trial_ended,
        )

        def ask() -> bool:
            nonlocal asked
            asked = True
            if plan.config.nested:
                trials.save_and_stop()
            else:
                trials.begin_no_more()
                stop.set()
            progress.say("Stopping; trials that are not finished go on with --resume. A second time ends it at once.")
            return True

        def work() -> None:
            run_trials(
                trials,
                config.parallel,
                uses_gpu(config),
                setting.slots,
                sweep_run.folder.path,
                stop,
                _scheduler(plan, sweep_run, trials),
                at_once=population or 1,
                nested=plan.config.nested,
            )

        def close() -> None:
            trials.close()
            clock.note()

        run_to_end(work, interrupts, ask, close)
    # The report is made of what runs have in their folders, and without MLflow a trial is no run.
    remedy = f"; when it answers, steadymoe sweep --resume {sweep_run.info.name} tells it and completes the report"
    say_what_is_untold(trials.untold, console, remedy)
    if queue.exhausted is not None:
        print_line(console, f"The search is over: {queue.exhausted}.")
    return asked, trials.failure


def _scheduler(plan: SweepPlan, run: SweepRun, trials: SweepTrials) -> "Callable[[], TrialScheduler] | None":
    """Makes the scheduler, once Ray is there."""
    scheduler = plan.config.scheduler
    if isinstance(scheduler, AshaSchedulerConfig):

        def asha() -> "TrialScheduler":
            from tuning.tune_schedulers import Asha

            return Asha(scheduler, plan.rungs, list(run.journal.rungs), trials.at_rung)

        return asha
    if isinstance(scheduler, PbtSchedulerConfig):

        def pbt() -> "TrialScheduler":
            from tuning.tune_schedulers import Pbt

            population = run.journal.trials.values()
            exploited = sum(len(trial.exploits) for trial in population)
            states = [checkpoint_folders(RunFolder(Path(trial.begun.folder)).checkpoints) for trial in population]
            reached = max((step_of(own[-1]) for own in states if own), default=0)
            return Pbt(scheduler, plan.config.space, trials.exploit, exploited, reached)

        return pbt
    return None


def _in_words(plan: SweepPlan, config: RunConfig, slots: int) -> str:
    sweep, budget = plan.config, plan.config.budget
    count = f"{plan.points} configurations" if plan.points is not None else "configurations without end"
    limits = [
        f"{budget.trials} trials" if budget.trials else "",
        f"{budget.tokens:,} tokens" if budget.tokens else "",
        f"{budget.minutes:g} minutes" if budget.minutes else "",
    ]
    limit = ", ".join(filter(None, limits))
    rungs = f", compared at steps {', '.join(map(str, plan.rungs))}" if plan.rungs else ""
    return (
        f"{count} of {', '.join(sweep.space)}; {sweep.seeds} seed(s) each, {plan.steps:,} steps and "
        f"{config.tokens:,} tokens a trial{rungs}; {slots} at a time with {config.parallel.workers} worker(s)"
        + (f"; at most {limit}" if limit else "")
    )


def _tell(sweep_run: SweepRun, outcome: SweepOutcome, view: View, console: Console) -> None:
    """What came of it, and where everything is."""
    if outcome.order:
        _tell_order(outcome, console)
        page = sweep_run.folder.figures / PAGE
        if page.exists():
            print_line(console, f"Report    {page}")
    else:
        print_line(console, "No trial has come to its end yet.")
    print_links(sweep_run.folder, view, console)
    if sweep_run.undelivered:
        print_line(console, sweep_run.undelivered)


def _tell_order(outcome: SweepOutcome, console: Console) -> None:
    console.print()
    console.print(outcome.table())
    for sentence in outcome.findings:
        print_line(console, f"- {sentence}")
    if outcome.best is not None:
        print_line(console, f"The best: {outcome.plan.label(outcome.best.values)}. To train it:")
        print_line(console, f"  steadymoe train {outcome.best_file}")
    else:
        print_line(console, "No configuration finished within the constraints, so there is no best one.")
        if nearest := _nearest(outcome):
            print_line(console, nearest)


def _nearest(outcome: SweepOutcome) -> str | None:
    """Of those that exceed a constraint, the one that does so the least."""
    first, objective = outcome.order[0], outcome.plan.config.objective
    if first.outcome != "finished":
        return None
    by = [f"{name} by {by:.4g}" for name, by in first.violations(objective).items() if by > 0]
    return f"The nearest is {outcome.plan.label(first.values)}, which exceeds {' and '.join(by)}."


def main(argv: Sequence[str] | None = None) -> int:
    """The command without the rest of the command line."""
    return run_command(SweepArguments, commands.sweep, argv, "python -m tuning.sweep")


if __name__ == "__main__":
    sys.exit(run_in_job(main))
