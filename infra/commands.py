"""This wing's commands up to the point where more than the arguments is needed."""

from collections.abc import Sequence

from infra.arguments import DownArguments, StatusArguments, SubmitArguments, UpArguments
from pipelines.command_line import EXIT_DONE


def up(arguments: UpArguments) -> int:
    """Start the local cluster; returns the exit code.

    Raises:
        UserError: a port is taken, or something did not start.
    """
    from infra import cluster

    cluster.up(arguments)
    return EXIT_DONE


def status(_: StatusArguments) -> int:
    """Show the local cluster; returns the exit code."""
    from infra import cluster

    cluster.status()
    return EXIT_DONE


def down(_: DownArguments) -> int:
    """End the local cluster; returns the exit code."""
    from infra import cluster

    cluster.down()
    return EXIT_DONE


def submit(arguments: SubmitArguments, command: Sequence[str]) -> int:
    """Run a command as a job; returns the job's exit code.

    Raises:
        UserError: the command is wrong or cannot be a job, or there is no head.
    """
    from infra import jobs

    return jobs.submit(arguments, command)
