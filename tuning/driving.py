"""What the drivers of studies, sweeps and replays have in common while trials run."""

from collections.abc import Callable, Sequence

from rich.console import Console

from pipelines.interrupts import Interrupts
from pipelines.terminal import print_line


def run_to_end(
    work: Callable[[], None], interrupts: Interrupts, ask: Callable[[], bool], close: Callable[[], None]
) -> None:
    """Run ``work``, which runs trials; ``close`` tells MLflow what became of them, on every way out.

    Args:
        work: runs trials until there are none left, or ``ask`` has told it to stop.
        interrupts: those of the user.
        ask: called at the first interrupt.
        close: called at the end.

    Raises:
        KeyboardInterrupt: the user does not want to wait.
    """
    try:
        interrupts.wait(work, ask)
    except KeyboardInterrupt:
        import ray

        # The trials with it: nothing must be written any more when their runs are ended.
        ray.shutdown()
        raise
    finally:
        close()


def say_what_is_untold(untold: Sequence[str], console: Console, remedy: str = "") -> None:
    """Name the trials that MLflow could not be told of, and what tells it."""
    if untold:
        print_line(console, f"MLflow could not be told of {len(untold)} trials: {', '.join(untold)}{remedy}")
