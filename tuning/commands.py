"""This wing's commands up to the point where torch, ray and mlflow are needed (their import alone takes seconds)."""

import os
from pathlib import Path

from pipelines.command_line import EXIT_DONE
from pipelines.errors import UserError
from pipelines.loading import dump_config
from pipelines.run_folder import find_run, find_sweep
from tuning.arguments import CompareArguments, ReplayArguments, StudyArguments, SweepArguments
from tuning.replay_plan import make_plan
from tuning.study_loading import load_study, study_titles
from tuning.sweep_loading import load_sweep, sweep_titles


def study(arguments: StudyArguments) -> int:
    """Run a study; returns the exit code.

    Raises:
        UserError: the study does not hold, or the one to resume cannot be, or the findings cannot be written.
    """
    if arguments.findings is not None:
        _refuse_unwritable("--findings", Path(arguments.findings), "a Markdown file")
    if arguments.resume is None:
        if not arguments.study:
            print("\n".join(f"{name:<14} {title}" for name, title in study_titles()))
            return EXIT_DONE
        config = load_study(arguments.study[0], arguments.settings, **arguments.changed)
        if arguments.print_config:
            print(dump_config(config), end="")
            return EXIT_DONE
    from tuning.study import run

    return run(arguments)


def sweep(arguments: SweepArguments) -> int:
    """Run a sweep; returns the exit code.

    Raises:
        UserError: the sweep does not hold, or the one to resume cannot be.
    """
    if arguments.resume is None:
        if not arguments.sweep:
            print("\n".join(f"{name:<16} {title}" for name, title in sweep_titles()))
            return EXIT_DONE
        plan = load_sweep(arguments.sweep[0], arguments.settings, **arguments.changed)
        if arguments.print_config:
            print(dump_config(plan.config), end="")
            return EXIT_DONE
    from tuning.sweep import run

    return run(arguments)


def compare(arguments: CompareArguments) -> int:
    """Compare runs; returns the exit code.

    Raises:
        UserError: there is no such run, one cannot be compared, or the page cannot be written.
    """
    if arguments.out is not None:
        _refuse_unwritable("--out", Path(arguments.out), "an HTML file")
    out = Path(arguments.out) if arguments.out is not None else None
    folders = [find_run(run) for run in arguments.runs]
    sweep = find_sweep(arguments.sweep) if arguments.sweep is not None else None
    from tuning.compare import compare_sweep, run

    return compare_sweep(sweep, out) if sweep is not None else run(folders, out)


def replay(arguments: ReplayArguments) -> int:
    """Run a spike again under treatments; returns the exit code.

    Raises:
        UserError: there is no such run or event, a treatment cannot act, or a setting is wrong.
    """
    run_of_spike = find_run(arguments.run)
    plan = make_plan(run_of_spike, arguments.event, arguments.treatments, arguments.after, arguments.settings)
    from tuning.replay import run

    return run(plan)


def _refuse_unwritable(option: str, file: Path, kind: str) -> None:
    """Before the work rather than after it."""
    if file.is_dir():
        raise UserError(f"{option} {file}: is a folder; name {kind} in it")
    folder = next(above for above in file.absolute().parents if above.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{option} {file}: cannot be written, for {folder} is no folder that can be written to")
