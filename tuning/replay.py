"""``steadymoe replay``: a spike again, from before it and under treatments, as trials under one MLflow parent."""

import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from rich.console import Console

from pipelines import spike_words
from pipelines.command_line import EXIT_DONE, EXIT_INTERRUPTED, run_command
from pipelines.environment import environment
from pipelines.home import refuse_unwritable_home
from pipelines.interrupts import Interrupts
from pipelines.job import run_in_job
from pipelines.orphans import end_orphaned_parents, end_orphans_in_background
from pipelines.ray_session import ray_session, refuse_impossible_cluster, runs_at_a_time, uses_gpu, worker_environment
from pipelines.run_folder import read_json
from pipelines.shards import Shards
from pipelines.summary import print_links
from pipelines.terminal import list_console, print_line
from pipelines.text import fit_to_text, prepare_shown
from pipelines.tracking_store import TrackingStore, open_store_in_background, tracking_uri
from pipelines.views import REPLAYS
from tuning import commands
from tuning.arguments import ReplayArguments
from tuning.driving import run_to_end, say_what_is_untold
from tuning.replay_outcome import ReplayOutcome, conclude_replay
from tuning.replay_plan import Plan
from tuning.replay_run import ReplayRun, keep_checkpoint
from tuning.replay_trials import ReplayTrials, Trial
from tuning.reproduction import Reproduction, compare, what_is_different
from tuning.trials import run_trials


def run(plan: Plan) -> int:
    """One replay; returns the exit code.

    Raises:
        UserError: the text, the tracking store or the cluster do not allow it.
        RuntimeError: a trial failed for good.
    """
    console = list_console()
    refuse_unwritable_home()
    plain = plan.arms[0].config
    refuse_impossible_cluster(plain)
    shards = prepare_shown(plain.data, console)
    for arm in plan.arms:
        fit_to_text(arm.config, shards)
    opening = open_store_in_background(tracking_uri(plain.tracking, plan.run.info))
    for line in _in_words(plan):
        print_line(console, line)
    print_line(console, "starting Ray ...")
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        stack.enter_context(ray_session(plain, worker_environment(plain)))
        store = opening.result()
        end_orphaned_parents(store)
        end_orphans_in_background(store)
        replay = ReplayRun.begin(plan, store)
        with replay:
            done = _run(plan, replay, shards, store, interrupts, console)
            outcome = None
            if done.trials and done.trials[0].arm is plan.arms[0]:
                reproduction = _reproduction(plan, done.trials[0], shards)
                outcome = conclude_replay(plan, replay, done.trials, done.samples, reproduction)
            if done.stopped:
                replay.status = "KILLED"
    return _tell(replay, outcome, done, console)


@dataclass(frozen=True)
class _Done:
    """What of a replay was run."""

    trials: Sequence[Trial]
    samples: Sequence[int]
    stopped: bool
    """By the user."""


def _run(
    plan: Plan, replay: ReplayRun, shards: Shards, store: TrackingStore, interrupts: Interrupts, console: Console
) -> _Done:
    config = plan.arms[0].config
    checkpoint = plan.start.checkpoint
    if checkpoint is not None:
        checkpoint = keep_checkpoint(checkpoint, replay.folder.path / "start")
    stop, asked, ended = threading.Event(), threading.Event(), 0

    def ask() -> bool:
        asked.set()
        stop.set()
        print_line(console, "Stopping; what has ended is shown. A second time ends it at once.")
        return True

    def tell(trial: Trial, seconds: float) -> None:
        nonlocal ended
        ended += 1
        found = trial.measured
        words = "diverged" if found.diverged else spike_words.counted(found.events, "event") if found.events else "calm"
        print_line(console, f"[{ended}/{len(plan.arms)}] {trial.arm.name:<14} {words}  {seconds:.0f} s")

    trials = ReplayTrials(plan, replay, shards, store, checkpoint, stop, tell)
    slots = min(runs_at_a_time(config), len(plan.arms))
    parallel, gpu = config.parallel, uses_gpu(config)
    run_to_end(
        lambda: run_trials(trials, parallel, gpu, slots, replay.folder.path, stop), interrupts, ask, trials.close
    )
    say_what_is_untold(trials.untold, console)
    if trials.failure is not None:
        raise trials.failure
    return _Done(trials.done, trials.samples, asked.is_set())


def _reproduction(plan: Plan, plain: Trial, shards: Shards) -> Reproduction:
    manifest = shards.manifest
    digests = {"corpus_digest": manifest.corpus_digest, "tokenizer_sha256": manifest.tokenizer.sha256}
    then, now = read_json(plan.run.environment), environment()
    reasons = what_is_different(plan, digests, then, now, uses_gpu(plain.arm.config))
    return compare(plan, plain.folder.spool, reasons)


def _in_words(plan: Plan) -> list[str]:
    event, steps = plan.event, plan.until - plan.start.step
    lines = [
        f"{event.id} of run {plan.run.info.name}: {spike_words.what(event)}; {spike_words.answer(event)}",
        f"from {plan.start.says}: steps {plan.start.step + 1:,} to {plan.until:,} under {len(plan.arms)} treatments, "
        f"{steps * len(plan.arms):,} steps in all",
    ]
    return lines + [f"left out: {name}, for {why}" for name, why in plan.left_out.items()]


def _tell(replay: ReplayRun, outcome: ReplayOutcome | None, done: _Done, console: Console) -> int:
    print_line(console, "")
    if outcome is not None:
        console.print(outcome.table())
        print_line(console, outcome.sentence)
        print_line(console, f"As it was: {outcome.reproduction.sentence}.")
    print_links(replay.folder, REPLAYS, console)
    if replay.undelivered:
        print_line(console, replay.undelivered)
    if done.stopped:
        print_line(console, "The replay ended early.")
        return EXIT_INTERRUPTED
    return EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """The command without the rest of the command line."""
    return run_command(ReplayArguments, commands.replay, argv, "python -m tuning.replay")


if __name__ == "__main__":
    sys.exit(run_in_job(main))
