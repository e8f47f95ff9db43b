"""The command ``steadymoe``: assembles the subcommands of all wings and nothing else."""

from collections.abc import Sequence
from importlib.metadata import version

from pydantic import BaseModel, ConfigDict
from pydantic_settings import CliSubCommand, CliToggleFlag

from pipelines import commands
from pipelines.arguments import DeliverArguments, TrainArguments
from pipelines.command_line import EXIT_DONE, run_command
from pipelines.errors import UserError

PROGRAM = "steadymoe"


class Steadymoe(BaseModel):
    """Train Mixture-of-Experts language models that stay stable, and see what keeps them so.

    Example:
      steadymoe train micro --set optimizer.lr=1e-3
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    version: CliToggleFlag[bool] = False
    """Print the version and stop."""
    train: CliSubCommand[TrainArguments]
    """One training run."""
    deliver: CliSubCommand[DeliverArguments]
    """Send MLflow what it could not take while a run was on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 the user's input is wrong; a defect raises."""
    return run_command(Steadymoe, _dispatch, argv, PROGRAM)


def _dispatch(arguments: Steadymoe) -> int:
    if arguments.version:
        print(f"{PROGRAM} {version(PROGRAM)}")
        return EXIT_DONE
    if arguments.train is not None:
        return commands.train(arguments.train)
    if arguments.deliver is not None:
        return commands.deliver(arguments.deliver)
    raise UserError(f"no command given (see {PROGRAM} --help)")
