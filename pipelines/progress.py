"""What the user sees while training runs: a live bar in a terminal, plain lines anywhere else.

with RunProgress(run.folder, config.steps) as progress:
    progress.phase("starting 2 Ray workers")
    trainer.fit()
"""

import math
import threading
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from pipelines.history import WARM_UP_STEPS
from pipelines.notes import read_notes
from pipelines.run_folder import RunFolder
from pipelines.spool import REWIND, TRAIN, VALIDATION, Record, SpoolReader, live

# Also how often a bar is drawn again.
_POLL_S = 0.25

# Plain lines: one per 5 % of the steps, but none sooner than 5 s after the last, and one a minute in any case.
_LINE_FRACTION = 0.05
_LINE_SOONEST_S = 5.0
_LINE_LATEST_S = 60.0

# Weight of the newest step in the moving average of the speed.
_SPEED_WEIGHT = 0.1


class Standing:
    """Where a run is, as far as its records tell."""

    def __init__(self, total_steps: int, step: int = 0) -> None:
        self.total_steps = total_steps
        self.step = step
        self.values: dict[str, float] = {}
        """The last value of every metric, NaN where it was not finite."""
        self.tokens_per_second: float | None = None
        self.time_ms = 0
        self._seen = 0
        self._origin: tuple[int, int] | None = None

    def add(self, record: Record) -> None:
        """Take up a newer record."""
        self.values.update(record.metrics)
        self.values.update(dict.fromkeys(record.non_finite, math.nan))
        self.time_ms = record.time_ms
        if record.kind == REWIND:
            self.step = record.step
        if record.kind != TRAIN:
            return
        self.step = record.step
        self._seen += 1
        if self._seen == WARM_UP_STEPS:
            self._origin = record.step, record.time_ms
        if self._seen > WARM_UP_STEPS and (speed := record.metrics.get("train/tokens_per_second")) is not None:
            old = speed if self.tokens_per_second is None else self.tokens_per_second
            self.tokens_per_second = old + _SPEED_WEIGHT * (speed - old)

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the pace since start-up was over (validations and checkpoints included)."""
        if self._origin is None or self.step <= self._origin[0]:
            return None
        per_step = (self.time_ms - self._origin[1]) / (self.step - self._origin[0]) / 1000
        return per_step * (self.total_steps - self.step)

    def figures(self) -> str:
        """What is known of the training, in a line."""
        shown = [
            _figure("loss {:.3f}", self.values.get("train/loss")),
            _figure("val {:.3f}", self.values.get("val/loss")),
            _figure("grad {:.2f}", self.values.get("train/grad_norm")),
            _figure("MaxVio {:.2f}", self.values.get("moe/max_vio_batch")),
            _figure("{:,.0f} tokens/s", self.tokens_per_second),
            f"ETA {clock(self.seconds_left)}" if self.seconds_left is not None else "",
        ]
        return "  ".join(filter(None, shown))


def clock(seconds: float) -> str:
    """A duration as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class View(Protocol):
    """How progress is shown."""

    def phase(self, text: str) -> None:
        """Say what goes on before the first step, or between steps."""

    def say(self, text: str) -> None:
        """Show a line that stays."""

    def show(self, standing: Standing, record: Record) -> None:
        """Show where the run is after a new record."""

    def close(self) -> None:
        """Show the end of it."""


class LiveView:
    """A bar that is drawn over itself. What is printed meanwhile appears above it."""

    def __init__(self, console: Console, total_steps: int, step: int) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("starting", total=total_steps, completed=step)
        self._live = Live(self._draw(""), console=console, refresh_per_second=4)
        self._live.start()

    def phase(self, text: str) -> None:
        self._progress.update(self._task, description=text)
        self._live.refresh()

    def say(self, text: str) -> None:
        self._live.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def show(self, standing: Standing, record: Record) -> None:
        if record.kind in (TRAIN, REWIND):
            self._progress.update(self._task, description="training", completed=standing.step)
        self._live.update(self._draw(standing.figures()))

    def close(self) -> None:
        self._live.stop()

    def _draw(self, figures: str) -> Group:
        return Group(self._progress, Text(f"  {figures}", style="dim", no_wrap=True, overflow="ellipsis"))


class LineView:
    """Plain lines at sensible intervals, for files and for the logs of jobs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_step = 0
        self._last_time_ms = 0

    def phase(self, text: str) -> None:
        self._print(f"{text} ...")

    def say(self, text: str) -> None:
        self._print(text)

    def show(self, standing: Standing, record: Record) -> None:
        if self._is_due(standing, record):
            self._last_step, self._last_time_ms = standing.step, standing.time_ms
            width = len(str(standing.total_steps))
            self._print(f"step {standing.step:>{width}}/{standing.total_steps}  {standing.figures()}")

    def close(self) -> None:
        """Every line is complete when it is printed."""

    def _is_due(self, standing: Standing, record: Record) -> bool:
        """By the records' own clock, so that what is printed depends on the run and not on when it was looked at."""
        if record.kind != TRAIN:
            return record.kind == VALIDATION
        if not self._last_time_ms:
            return True
        waited_s = (standing.time_ms - self._last_time_ms) / 1000
        advanced = (standing.step - self._last_step) / standing.total_steps
        return waited_s >= _LINE_LATEST_S or (waited_s >= _LINE_SOONEST_S and advanced >= _LINE_FRACTION)

    def _print(self, text: str) -> None:
        # Never wrapped at the 80 columns that rich takes for a file, and flushed: the reader may be waiting.
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)
        self._console.file.flush()


class RunProgress:
    """Shows a run from what it appends to its spool and its notes, from a thread of its own."""

    def __init__(self, folder: RunFolder, total_steps: int, console: Console | None = None) -> None:
        """Follow the run in ``folder``; what an earlier part of the run has recorded counts as seen."""
        console = console or Console()
        self._notes = folder.notes
        self._notes_seen = len(read_notes(folder.notes))
        self._reader = SpoolReader(folder.spool)
        seen = max((record.step for record in live(self._reader.read()) if record.kind == TRAIN), default=0)
        self._standing = Standing(total_steps, seen)
        self._view: View = LiveView(console, total_steps, seen) if console.is_terminal else LineView(console)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def phase(self, text: str) -> None:
        """Say what goes on while no step is taken, for instance "starting 2 Ray workers"."""
        with self._lock:
            self._view.phase(text)

    def say(self, text: str) -> None:
        """Show a line that stays."""
        with self._lock:
            self._view.say(text)

    def poll(self) -> None:
        """Show what is new."""
        with self._lock:
            notes = read_notes(self._notes)
            for note in notes[self._notes_seen :]:
                self._view.say(note.text)
            self._notes_seen = len(notes)
            for record in self._reader.read():
                self._standing.add(record)
                self._view.show(self._standing, record)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.poll()
        self._view.close()

    def _run(self) -> None:
        while not self._ended.wait(_POLL_S):
            self.poll()


def _figure(template: str, value: float | None) -> str:
    return "" if value is None else template.format(value)
