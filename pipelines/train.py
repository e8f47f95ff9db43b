"""The driver of a training run: text to tokens, a tracked run, Ray Train workers, and what the user sees of it.

``python -m pipelines.train tiny`` takes the arguments of ``steadymoe train``, for ``ray job submit``.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipelines import commands
from pipelines.arguments import TrainArguments
from pipelines.command_line import (
    EXIT_DEFECT,
    EXIT_DONE,
    EXIT_ENDED_BY_POLICY,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    run_command,
)
from pipelines.config import RunConfig
from pipelines.description import Status
from pipelines.errors import UserError
from pipelines.fit import fit
from pipelines.home import refuse_unwritable_home
from pipelines.init_from import check_start
from pipelines.interrupts import Interrupts
from pipelines.job import job_tags, run_in_job
from pipelines.loading import load_config
from pipelines.orphans import end_orphans_in_background
from pipelines.outcome import Ending, Outcome
from pipelines.progress import RunProgress
from pipelines.ray_session import ray_session, refuse_impossible_cluster
from pipelines.run_folder import RunFolder, find_run
from pipelines.spike_report import write_spike_report
from pipelines.summary import print_summary
from pipelines.text import dataset_info, fit_to_text, prepare_shown
from pipelines.tracking import Tracker
from pipelines.tracking_store import open_store_in_background, tracking_uri

_STATUS: dict[Outcome, Status] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "diverged": "FAILED",
    "refused": "FAILED",
    "failed": "FAILED",
}
_EXIT_CODES: dict[Outcome, int] = {
    "finished": EXIT_DONE,
    "stopped": EXIT_INTERRUPTED,
    "diverged": EXIT_ENDED_BY_POLICY,
    "refused": EXIT_USER_ERROR,
    "failed": EXIT_DEFECT,
}


def run(arguments: TrainArguments) -> int:
    """One training run, new or resumed; returns the exit code.

    Raises:
        UserError: config, text, tracking store or cluster do not allow the run.
    """
    started = time.monotonic()
    console = Console()
    resumed = find_run(arguments.resume) if arguments.resume is not None else None
    config = load_config([str(resumed.config)], arguments.settings) if resumed else arguments.config()
    info = resumed.info if resumed else None
    refuse_unwritable_home()
    refuse_impossible_cluster(config)
    shards = prepare_shown(config.data, console)
    config = fit_to_text(config, shards)
    init_from = resumed.init_from if resumed else arguments.weights
    check_start(init_from, resumed, config, console)
    # Importing MLflow takes seconds, and so does starting Ray. Not sooner: wrong text leaves no database behind.
    opening = open_store_in_background(tracking_uri(config.tracking, info))
    _print(console, "starting Ray ...")
    with Interrupts() as interrupts, ray_session(config):
        tracker = Tracker.start(
            config,
            opening.result(),
            dataset=dataset_info(shards),
            preset=arguments.presets[0],
            resume=resumed,
            tags={**job_tags(), **({"init_from": str(init_from)} if init_from else {})},
        )
        if init_from:
            tracker.folder.write_init_from(init_from)
        end_orphans_in_background(tracker.store, parents=True)
        with tracker, RunProgress(tracker.folder, config.steps, console) as progress:
            progress.phase(f"starting {config.parallel.workers} Ray Train worker(s)")
            ending = fit(config, shards, tracker.folder, progress, interrupts)
            if (status := _STATUS[ending.outcome]) != "FINISHED":
                tracker.end_as(status, ending.reason)
            _draw(config, tracker.folder, progress)
            report = _report_spikes(tracker.folder, ending, progress)
    print_summary(tracker.folder, time.monotonic() - started, console)
    if report is not None:
        _print(console, f"Spikes    {report}")
    if tracker.undelivered:
        _print(console, tracker.undelivered)
    if ending.outcome == "refused":
        raise UserError(str(ending.reason))
    if ending.outcome != "finished":
        _print(console, f"The run ended early: {ending.reason}.")
    if ending.outcome == "stopped":
        _print(console, f"To go on: steadymoe train --resume {tracker.folder.info.name}")
    return _EXIT_CODES[ending.outcome]


def _draw(config: RunConfig, folder: RunFolder, progress: RunProgress) -> None:
    """Draw the run's picture while the run is still open, so that its end delivers it."""
    from pipelines.figure import draw_run

    try:
        draw_run(folder, config)
    except OSError as error:
        # A full disk. How the run ended is worth more than its picture.
        progress.say(f"The picture of the run could not be drawn: {error}")


def _report_spikes(folder: RunFolder, ending: Ending, progress: RunProgress) -> Path | None:
    """Write the report of the run's spikes, if there were any."""
    try:
        return write_spike_report(folder, ending.reason if ending.outcome == "diverged" else None)
    except OSError as error:
        progress.say(f"The report of the run's spikes could not be written: {error}")
        return None


def _print(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command without the rest of the command line."""
    return run_command(TrainArguments, commands.train, argv, "python -m pipelines.train")


if __name__ == "__main__":
    sys.exit(run_in_job(main))
