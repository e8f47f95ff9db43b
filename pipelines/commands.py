"""This wing's commands up to the point where torch, ray and mlflow are needed (their import alone takes seconds)."""

from pipelines.arguments import TrainArguments
from pipelines.command_line import EXIT_DONE
from pipelines.loading import dump_config


def train(arguments: TrainArguments) -> int:
    """One training run; returns the exit code.

    Raises:
        UserError: the config does not hold, or the run to resume cannot be.
    """
    if arguments.resume is None:
        config = arguments.config()
        if arguments.print_config:
            print(dump_config(config), end="")
            return EXIT_DONE
    from pipelines.train import run

    return run(arguments)
