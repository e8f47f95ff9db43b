"""The picture of a spike event: loss, gradient norm and load balance over the steps around it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import UserError
from pipelines.history import History, Series
from pipelines.plotting import BLUE, DPI, GREEN, INK, ORANGE, WIDTH, frame, number_log_axis, say_empty
from pipelines.run_folder import RunFolder
from pipelines.spike_event import SpikeEvent
from pipelines.spike_words import what

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS_AROUND = 40
"""So many steps before an event are shown, and after it."""

# Metric, title, and whether it may grow by orders of magnitude.
_PANELS = (
    ("train/loss", "Loss (nats per token)", True),
    ("train/grad_norm", "Gradient norm, before clipping", True),
    ("moe/max_vio_batch", "MaxVio (load of the busiest expert over the mean, minus 1)", False),
)


def draw_event(folder: RunFolder, event: SpikeEvent) -> Path:
    """Draw an event into its run's folder of figures: a PNG file of 1600 x 1200 pixels; its path.

    Raises:
        UserError: it cannot be written there.
    """
    from matplotlib.figure import Figure

    history = History.read(folder.spool)
    figure = Figure(figsize=(WIDTH, 7.5), dpi=DPI, layout="constrained")
    title = f"{folder.info.name}, {what(event)}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold", color=INK, wrap=True)
    panels = figure.subplots(len(_PANELS), 1, sharex=True)
    for axes, (metric, name, log) in zip(panels, _PANELS, strict=True):
        _draw(axes, history, event, metric)
        frame(axes, name)
        if not axes.lines:
            say_empty(axes)
            continue
        if log:
            axes.set_yscale("log")
            number_log_axis(axes.yaxis)
        _mark(axes, event)
    panels[-1].set_xlabel("optimizer step", color=INK, fontsize=9)
    drawn = next((axes for axes in panels if axes.lines), None)
    if drawn is not None:
        drawn.legend(frameon=False, fontsize=8.5, labelcolor=INK)
    path = folder.figures / f"spike-{event.id}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _draw(axes: "Axes", history: History, event: SpikeEvent, metric: str) -> None:
    taken = _around(history.series.get(metric, Series()), event)
    if taken.steps:
        axes.plot(taken.steps, taken.values, ".-", color=BLUE, linewidth=1.4, markersize=4, label="training")
    label: str | None = "taken back"
    for attempt in _attempts(_around(history.rewound.get(metric, Series()), event)):
        axes.plot(
            *(attempt.steps, attempt.values, "o--"),
            color=ORANGE,
            markerfacecolor="none",
            markersize=5,
            linewidth=1.0,
            label=label,
        )
        label = None


def _mark(axes: "Axes", event: SpikeEvent) -> None:
    axes.axvline(event.step, color=INK, linewidth=1.0, linestyle="--", label=f"the event, step {event.step:,}")
    if event.rewound_to is not None and event.rewound_to >= event.step - STEPS_AROUND:
        words = f"back to step {event.rewound_to:,}"
        axes.axvline(event.rewound_to, color=GREEN, linewidth=1.2, linestyle=":", label=words)


def _around(series: Series, event: SpikeEvent) -> Series:
    near = Series()
    for step, value in zip(series.steps, series.values, strict=True):
        if abs(step - event.step) <= STEPS_AROUND:
            near.add(step, value)
    return near


def _attempts(series: Series) -> Iterator[Series]:
    """The runs of rising steps, each of which was taken back by itself."""
    attempt = Series()
    for step, value in zip(series.steps, series.values, strict=True):
        if attempt.steps and step <= attempt.steps[-1]:
            yield attempt
            attempt = Series()
        attempt.add(step, value)
    if attempt.steps:
        yield attempt
