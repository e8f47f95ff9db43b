"""This wing's commands up to the point where torch, ray and mlflow are needed (their import alone takes seconds)."""

from pipelines.command_line import EXIT_DONE
from pipelines.loading import dump_config
from tuning.arguments import StudyArguments
from tuning.study_loading import load_study, study_titles


def study(arguments: StudyArguments) -> int:
    """Run a study; returns the exit code.

    Raises:
        UserError: the study does not hold, or the one to resume cannot be.
    """
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
