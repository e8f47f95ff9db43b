"""The picture of a replay: loss, gradient norm and load balance around the spike, a line for each treatment."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.plotting import DPI, INK, WIDTH, frame, number_log_axis, say_empty
from pipelines.spool import Record
from pipelines.views import run_colour
from tuning.replay_plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Metric, title, and whether it may grow by orders of magnitude.
_PANELS = (
    ("train/loss", "Loss (nats per token)", True),
    ("train/grad_norm", "Gradient norm, before clipping", True),
    ("moe/max_vio_batch", "MaxVio (load of the busiest expert over the mean, minus 1)", False),
)
# Steps before the onset that are shown at most.
_BEFORE = 40

Course = Mapping[int, Record]
"""Records of training by their steps."""


def draw_replay(plan: Plan, run: Course, treatments: Mapping[str, Course], path: Path) -> None:
    """Draw a replay into a PNG file of 1600 x 1440 pixels.

    Args:
        plan: the replay.
        run: the steps of the run itself, on the event's timeline.
        treatments: those of each treatment's trial, in the plan's order.
        path: the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replay_figure(plan, run, treatments).savefig(path)


def replay_figure(plan: Plan, run: Course, treatments: Mapping[str, Course]) -> "Figure":
    """The figure of `draw_replay`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 9.0), dpi=DPI, layout="constrained")
    title = f"{plan.event.id} of run {plan.run.info.name}, replayed from step {plan.start.step + 1:,}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold", color=INK, wrap=True)
    panels = figure.subplots(len(_PANELS), 1, sharex=True)
    for axes, (metric, name, log) in zip(panels, _PANELS, strict=True):
        _plot(axes, plan, run, metric, "the run", INK, width=3.5, alpha=0.25)
        for number, (treatment, course) in enumerate(treatments.items()):
            # What changes nothing is on top, with gaps: a treatment without effect lies under it.
            _plot(axes, plan, course, metric, treatment, run_colour(number), width=1.4, on_top=number == 0)
        frame(axes, name)
        if not axes.lines:
            say_empty(axes)
            continue
        if log:
            axes.set_yscale("log")
            number_log_axis(axes.yaxis)
        axes.axvline(plan.event.step, color=INK, linewidth=1.0, linestyle="--")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    panels[-1].set_xlabel("optimizer step; dashed: the event", color=INK, fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=5, frameon=False, fontsize=8.5, labelcolor=INK)
    return figure


def _plot(
    axes: "Axes",
    plan: Plan,
    course: Course,
    metric: str,
    label: str,
    color: str,
    *,
    width: float,
    alpha: float = 1.0,
    on_top: bool = False,
) -> None:
    first = max(plan.start.step + 1, plan.onset - _BEFORE)
    values = {
        step: record.metrics[metric]
        for step, record in sorted(course.items())
        if first <= step <= plan.until and metric in record.metrics
    }
    if values:
        line, order = ("--", 3) if on_top else ("-", 2)
        axes.plot(
            *(list(values), list(values.values()), line),
            color=color,
            linewidth=width,
            alpha=alpha,
            label=label,
            zorder=order,
        )
