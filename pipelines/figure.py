"""The picture of a training run: loss, gradient norm, load balance and learning rate over the steps."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe.config.clip import ClipConfig, GlobalClipConfig, ZClipConfig
from pipelines.config import RunConfig
from pipelines.description import model_in_words
from pipelines.history import History, Series
from pipelines.plotting import BLUE, DPI, GREEN, INK, ORANGE, VIOLET, WIDTH, frame, number_log_axis, say_empty
from pipelines.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE_NAME = "training.png"

# Over this share of the steps the bold line averages.
_SMOOTHING = 0.03


def draw_run(folder: RunFolder, config: RunConfig) -> Path:
    """Draw a run into its folder of figures, from where it reaches MLflow; the picture's path."""
    history = History.read(folder.spool)
    path = folder.figures / FILE_NAME
    title = f"{folder.info.name}: {model_in_words(config, history)}"
    draw_training(history, path, title, clip_line(config.stability.clip))
    return path


def clip_line(clip: ClipConfig) -> float | None:
    """The global gradient norm above which gradients are clipped at every step, if there is one."""
    return clip.max_norm if isinstance(clip, GlobalClipConfig | ZClipConfig) else None


def draw_training(history: History, path: Path, title: str, clip_at: float | None = None) -> None:
    """Draw a history into a PNG file of 1600 x 1000 pixels; panels without data say so.

    ``clip_at`` is the gradient norm above which gradients are clipped, where there is one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 6.25), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold", color=INK, wrap=True)
    loss, norm, balance, rate = figure.subplots(2, 2, sharex=True).flat
    _line(loss, history, "train/loss", "training", BLUE, smooth=True)
    _points(loss, history, "val/loss", "validation", ORANGE)
    _line(norm, history, "train/grad_norm", "norm", VIOLET, smooth=True)
    _line(balance, history, "moe/max_vio_batch", "batch", GREEN, smooth=True)
    _points(balance, history, "moe/max_vio_global", "validation set", ORANGE)
    _line(rate, history, "train/lr", "learning rate", BLUE)
    _frame(loss, "Loss (nats per token)")
    if clip_at is not None:
        norm.axhline(clip_at, color=ORANGE, linewidth=1.4, linestyle="--", label="clipped above")
    _frame(norm, "Gradient norm, before clipping", log=True)
    _frame(balance, "MaxVio (load of the busiest expert over the mean, minus 1)", floor=0)
    _frame(rate, "Learning rate", floor=0)
    for axes in (balance, rate):
        axes.set_xlabel("optimizer step", color=INK, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean over ``window`` values around each (an odd number; over those that there are, near the ends)."""
    sums = [0.0, *itertools.accumulate(values)]
    reach = window // 2
    spans = ((max(0, index - reach), min(len(values), index + reach + 1)) for index in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def _line(axes: "Axes", history: History, metric: str, label: str, color: str, smooth: bool = False) -> None:
    series = history.series.get(metric, Series())
    window = round(len(series.values) * _SMOOTHING) | 1 if smooth else 1
    if window == 1:
        axes.plot(series.steps, series.values, color=color, linewidth=1.4, label=label)
        return
    axes.plot(series.steps, series.values, color=color, linewidth=0.7, alpha=0.35)
    axes.plot(series.steps, moving_average(series.values, window), color=color, linewidth=1.8, label=label)


def _points(axes: "Axes", history: History, metric: str, label: str, color: str) -> None:
    series = history.series.get(metric, Series())
    if series.values:
        axes.plot(
            series.steps,
            series.values,
            "o-",
            color=color,
            linewidth=1.4,
            markersize=4.5,
            markeredgecolor="white",
            label=label,
        )


def _frame(axes: "Axes", title: str, log: bool = False, floor: float | None = None) -> None:
    frame(axes, title)
    drawn = [line for line in axes.lines if len(line.get_xdata())]  # type: ignore[arg-type]
    if not drawn:
        say_empty(axes)
        return
    if log:
        axes.set_yscale("log")
        number_log_axis(axes.yaxis)
    if floor is not None:
        axes.set_ylim(bottom=floor)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)
