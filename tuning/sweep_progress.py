"""What the user sees while a sweep runs: a line per trial, and what runs: in a terminal always, elsewhere at times."""

import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipelines.progress import clock
from tuning.objective import LOSS, Configuration, configurations, ranked
from tuning.sweep_journal import Ended, SweepJournal
from tuning.sweep_loading import SweepPlan
from tuning.sweep_queue import SweepQueue

_SHOWN = 3
_PER_SECOND = 2
# A log in which trials take hours says that they are alive.
_LINE_LATEST_S = 60.0


class SweepProgress:
    """As a context manager it puts the terminal back at the end."""

    def __init__(
        self,
        plan: SweepPlan,
        journal: SweepJournal,
        queue: SweepQueue,
        steps: Mapping[str, int],
        console: Console,
        line_latest_s: float = _LINE_LATEST_S,
    ) -> None:
        """
        Args:
            plan: the sweep.
            journal: what it has done so far.
            queue: what is to come.
            steps: how far the trials are that run, by name, whenever it is looked at.
            console: where to.
            line_latest_s: without a terminal there is a line at least so often.
        """
        self._plan, self._journal, self._queue, self._console = plan, journal, queue, console
        self._steps = steps
        self._line_latest_s, self._spoke = line_latest_s, time.monotonic()
        self._closed = threading.Event()
        self._lines = threading.Thread(target=self._speak, name="sweep-progress", daemon=True)
        self._live = Live(
            console=console,
            get_renderable=self._render,
            refresh_per_second=_PER_SECOND,
            transient=True,
            auto_refresh=console.is_terminal,
        )

    def say(self, text: str) -> None:
        """Show a line that stays."""
        self._spoke = time.monotonic()
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def trial_ended(self, label: str, ended: Ended) -> None:
        """A trial is over."""
        trials, left = self._journal.trials, self._queue.left
        done = sum(trial.ended is not None for trial in trials.values())
        # All that have begun: those that wait for a slot, or for their first step, as well.
        count = f"{done}/{len(trials) + left}" if left is not None else f"{done}"
        loss = f"{ended.measures[LOSS]:.4f}" if LOSS in ended.measures else "-"
        several = self._plan.config.seeds > 1 or self._plan.config.confirm is not None
        seed = f" seed {trials[ended.name].begun.seed}" if several else ""
        width = max(len(self._plan.label(trial.values)) for trial in trials.values()) + len(seed)
        what = {"finished": "", "pruned": f"pruned at {ended.step}", "diverged": "DIVERGED", "failed": "FAILED"}
        how = f"{what[ended.outcome]:<14} {ended.seconds:.0f} s"
        self.say(f"[{count}] {label + seed:<{width}}  val {loss}  {how}  {self._best_words()}")
        if ended.outcome == "failed" and ended.reason:
            self.say(f"  {ended.reason}")

    def _best_words(self) -> str:
        best = self._best()
        return f"best {self._found(best[0])} at {self._plan.label(best[0].values)}" if best else "none finished yet"

    def _best(self) -> list[Configuration]:
        # Without the trials that run: a finalist is among the best while its further seeds do.
        over = (trial for trial in self._journal.trials.values() if trial.ended)
        found = [one for one in configurations(over) if one.outcome == "finished"]
        confirm = self._plan.config.confirm
        return ranked(found, self._plan.config.objective, confirm.seeds if confirm else 0)[:_SHOWN]

    def _found(self, one: Configuration) -> str:
        """Its loss; the best may be none that keeps the constraints."""
        loss = one.mean(LOSS)
        over = "" if one.is_feasible(self._plan.config.objective) else " (over a constraint)"
        return f"{loss:.4f}{over}" if loss is not None else "-"

    def _speak(self) -> None:
        while not self._closed.wait(max(0.0, self._spoke + self._line_latest_s - time.monotonic())):
            if time.monotonic() - self._spoke >= self._line_latest_s:
                running = [f"{name} {standing}" for name, standing, _ in self._running()]
                self.say(f"{self._budget_words()}: {', '.join(running) or 'no trial runs yet'}")

    def _running(self) -> list[tuple[str, str, str]]:
        """Name, standing and values of each trial that has begun and is not over."""
        steps, total = dict(self._steps), self._plan.steps
        return [
            (name, f"step {steps[name]:,} of {total:,}" if name in steps else "starts", self._plan.label(trial.values))
            for name, trial in sorted(self._journal.trials.items())
            if trial.ended is None
        ]

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for name, standing, label in self._running():
            table.add_row("runs", name, standing, label)
        for place, one in enumerate(self._best(), start=1):
            table.add_row(
                f"{place}.", f"val {self._found(one)}", f"{len(one.trials)} seed(s)", self._plan.label(one.values)
            )
        return Group(table, Text(self._budget_words()))

    def _budget_words(self) -> str:
        left, seconds = self._queue.left, self._queue.seconds_left(sum(dict(self._steps).values()))
        parts = [f"{clock(self._queue.seconds)} so far"]
        if left is not None:
            parts.append(f"{left} trials to begin")
        if seconds is not None:
            parts.append(f"about {clock(seconds)} left")
        return ", ".join(parts)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        else:
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._console.is_terminal:
            self._live.stop()
        else:
            # Not in the middle of a line.
            self._lines.join()
