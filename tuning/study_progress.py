"""What the user sees while a study runs: a line per trial, and in a terminal a bar with what is left."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from pipelines.progress import clock
from tuning.blocks import Blocks
from tuning.results import TrialResult
from tuning.study_config import StudyConfig

_FIGURES = 3


class StudyProgress:
    """As a context manager it puts the terminal back at the end."""

    def __init__(self, study: StudyConfig, blocks: Blocks, console: Console) -> None:
        self._study, self._blocks, self._console = study, blocks, console
        self._ended = 0
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("starting the first trials", total=None)

    def say(self, text: str) -> None:
        """Show a line that stays."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def trial_ended(self, result: TrialResult, seconds: float) -> None:
        """A trial has its result."""
        self._ended += 1
        left, total = self._blocks.seconds_left, self._ended + self._blocks.left
        shown = [(m, result.measures[m]) for m in self._study.shown if m in result.measures][:_FIGURES]
        figures = "  ".join(f"{measure} {value:.4g}" for measure, value in shown)
        eta = f"about {clock(left)} left of {self._blocks.begun} block(s)"
        self.say(f"[{self._ended}/{total}] {result.key.name:<24} {figures}  {seconds:.0f} s  {eta}")
        self._bar.update(
            self._task, completed=self._ended, total=total, description=f"{self._blocks.left} trials to go"
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
