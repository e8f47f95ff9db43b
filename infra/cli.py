"""The command ``steadymoe``: assembles the subcommands of all wings and nothing else."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_settings import CliSubCommand, CliToggleFlag, get_subcommand

from infra import commands as own_commands
from infra.arguments import DownArguments, StatusArguments, SubmitArguments, UpArguments
from pipelines import commands
from pipelines.arguments import DeliverArguments, ExportArguments, PrepareArguments, TrainArguments
from pipelines.command_line import EXIT_DONE, run_command
from pipelines.errors import UserError
from pipelines.spike_arguments import RunsArguments, SpikesArguments
from tuning import commands as tuning_commands
from tuning.arguments import CompareArguments, ReplayArguments, StudyArguments, SweepArguments

PROGRAM = "steadymoe"


class Steadymoe(BaseModel):
    """Train Mixture-of-Experts language models that stay stable, and see what keeps them so.

    Example:
      steadymoe train micro --set optimizer.lr=1e-3
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    version: CliToggleFlag[bool] = False
    """Print the version and stop."""
    prepare: CliSubCommand[PrepareArguments]
    """Turn text into a folder of token shards to train on."""
    train: CliSubCommand[TrainArguments]
    """One training run."""
    study: CliSubCommand[StudyArguments]
    """The arms of a claim over paired seeds: table, verdict, picture."""
    sweep: CliSubCommand[SweepArguments]
    """A search space of config keys on Ray Tune: which values are stable at the least loss."""
    runs: CliSubCommand[RunsArguments]
    """The runs with their stability figures."""
    spikes: CliSubCommand[SpikesArguments]
    """What went wrong in a run, and what was done about it."""
    compare: CliSubCommand[CompareArguments]
    """Runs side by side: a report with pictures, and how sure it is."""
    replay: CliSubCommand[ReplayArguments]
    """A spike again under treatments: which avoid it, and at what cost."""
    deliver: CliSubCommand[DeliverArguments]
    """Send MLflow what it could not take while a run was on."""
    export: CliSubCommand[ExportArguments]
    """Write a run's model as a Hugging Face folder."""
    up: CliSubCommand[UpArguments]
    """Start a local Ray head and MLflow server."""
    status: CliSubCommand[StatusArguments]
    """What of them runs, and the jobs."""
    down: CliSubCommand[DownArguments]
    """Stop the jobs and end both."""
    submit: CliSubCommand[SubmitArguments]
    """Run a command as a Ray job."""


_COMMANDS: Mapping[type[Any], Callable[[Any], int]] = {
    PrepareArguments: commands.prepare,
    TrainArguments: commands.train,
    StudyArguments: tuning_commands.study,
    SweepArguments: tuning_commands.sweep,
    RunsArguments: commands.runs,
    SpikesArguments: commands.spikes,
    CompareArguments: tuning_commands.compare,
    ReplayArguments: tuning_commands.replay,
    DeliverArguments: commands.deliver,
    ExportArguments: commands.export,
    UpArguments: own_commands.up,
    StatusArguments: own_commands.status,
    DownArguments: own_commands.down,
}
"""By the arguments that they take; `submit` takes a whole command besides."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 the user's input is wrong; a defect raises."""
    words, job = _split_job(sys.argv[1:] if argv is None else list(argv))
    return run_command(Steadymoe, partial(_dispatch, job=job), words, PROGRAM)


def _split_job(words: list[str]) -> tuple[list[str], list[str]]:
    """What is for `submit` itself, and the command after the two dashes, which is parsed by its own class."""
    if words[:1] != ["submit"] or "--" not in words:
        return words, []
    dashes = words.index("--")
    return words[:dashes], words[dashes + 1 :]


def _dispatch(arguments: Steadymoe, job: Sequence[str]) -> int:
    if arguments.version:
        print(f"{PROGRAM} {version(PROGRAM)}")
        return EXIT_DONE
    if arguments.submit is not None:
        return own_commands.submit(arguments.submit, job)
    chosen = get_subcommand(arguments, is_required=False)
    if chosen is None:
        raise UserError(f"no command given (see {PROGRAM} --help)")
    return _COMMANDS[type(chosen)](chosen)
