"""The picture of a study: each measure by arm, or by arm over the grid, with every seed to be seen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.plotting import COLORS, DPI, INK, frame, number_log_axis, say_empty, short_number
from tuning.results import Results
from tuning.statistics import Interval, interval
from tuning.study_config import Grid, StudyConfig
from tuning.study_sheet import StudySheet
from tuning.verdict import ClaimVerdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One fewer than the colours: 90 arms look different before a pair of the two comes back.
_MARKERS = "os^Dv<>Pp"
# Margin around what is drawn, as a share of its spread.
_MARGIN = 0.06
# Points across, of the dot of a seed.
_SEED_SIZE = 4.0
# Share of an axis that the number at a tick of the grid takes.
_TICK_WIDTH = 0.15


@dataclass(frozen=True)
class _Seeds:
    """A measure of an arm, at a point of the grid if there is one."""

    values: list[float]
    """By seed."""
    diverged: list[bool]
    """By seed."""

    @property
    def interval(self) -> Interval:
        return interval(self.values)


def draw_study(config: StudyConfig, results: Results, verdicts: Sequence[ClaimVerdict], path: Path) -> None:
    """Draw a study into a PNG file 1600 pixels wide and as high as its panels need."""
    path.parent.mkdir(parents=True, exist_ok=True)
    study_figure(config, results, verdicts).savefig(path)


def study_figure(config: StudyConfig, results: Results, verdicts: Sequence[ClaimVerdict]) -> "Figure":
    """The figure of a study.

    Without a grid, a panel for each of the first six shown measures, with a row for each arm; with one, a panel for
    each shown measure, with a line for each arm over the grid. An axis is logarithmic where its values are positive
    and over a decade apart. The verdicts stand below.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    sheet = StudySheet.of(config, verdicts)
    figure = Figure(
        figsize=sheet.size, dpi=DPI, layout=ConstrainedLayoutEngine(rect=sheet.panel_area, hspace=0.03, wspace=0.03)
    )
    panels = list(figure.subplots(sheet.rows, sheet.columns, squeeze=False, sharey=not config.grid).flat)
    for axes, measure, title in zip(panels, sheet.measures, sheet.titles, strict=False):
        frame(axes, title)
        if config.grid:
            _draw_over_grid(axes, config.grid, [_over_grid(results, measure, arm, config.grid) for arm in config.arms])
        else:
            _draw_rows(axes, sheet.row_names, [_seeds(results, measure, arm, None) for arm in config.arms])
    for axes in panels[len(sheet.measures) :]:
        axes.remove()
    for text in sheet.texts(_caption(config, results)):
        figure.text(0.012, text.y, text.content, **text.style, color=INK, parse_math=False)
    if config.grid:
        _draw_legend(figure, sheet, list(config.arms))
    return figure


def _look(index: int) -> tuple[str, str]:
    """Colour and marker of an arm."""
    return COLORS[index % len(COLORS)], _MARKERS[index % len(_MARKERS)]


def _seeds(results: Results, measure: str, arm: str, point: float | None) -> _Seeds:
    values = results.values(measure, arm, [point])
    diverged = results.values("diverged", arm, [point]) or [0.0] * len(values)
    return _Seeds(values, [value > 0 for value in diverged])


def _over_grid(results: Results, measure: str, arm: str, grid: Grid) -> dict[float, _Seeds]:
    found = {point: _seeds(results, measure, arm, point) for point in grid.values}
    return {point: seeds for point, seeds in found.items() if seeds.values}


def _caption(config: StudyConfig, results: Results) -> str:
    number = len(results.seeds)
    if not number:
        return "No block is whole yet."
    if number == 1:
        parts = ["Faint: the one seed. Bold: the same; one seed has no interval"]
    else:
        shape = "line and band" if config.grid else "mark and bar"
        parts = [f"Faint: one seed each. Bold {shape}: mean and 95 % interval of {number} seeds"]
    if any(any(_seeds(results, "diverged", arm, point).diverged) for arm in config.arms for point in config.points()):
        parts.append("×: diverged")
    return ". ".join(parts)


def _draw_rows(axes: "Axes", names: Sequence[str], arms: Sequence[_Seeds]) -> None:
    """A row for each arm: its seeds, and above them their mean and interval."""
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    if not any(arm.values for arm in arms):
        axes.set_xticks([])
        say_empty(axes)
        return
    _scale(axes, "x", [arm for arm in arms if arm.values])
    for row, arm in enumerate(arms):
        color, marker = _look(row)
        if not arm.values:
            axes.text(
                0.02, row, "not recorded", transform=axes.get_yaxis_transform(), fontsize=8, va="center", alpha=0.5
            )
            continue
        _scatter(axes, [(value, row + 0.2) for value in arm.values], arm.diverged, color)
        if math.isfinite(arm.interval.low):
            axes.plot(
                [arm.interval.low, arm.interval.high],
                [row - 0.1] * 2,
                color=color,
                linewidth=2.4,
                solid_capstyle="butt",
            )
        axes.plot(arm.interval.mean, row - 0.1, marker, color=color, markersize=7, markeredgecolor="white")


def _draw_over_grid(axes: "Axes", grid: Grid, arms: Sequence[dict[float, _Seeds]]) -> None:
    """A line for each arm: the mean at each point, the interval as a band, and the seeds."""
    axes.set_xscale("log")
    axes.minorticks_off()
    ticks = _spread(grid.values)
    axes.set_xticks(ticks, [short_number(value) for value in ticks])
    axes.set_xlabel(grid.key, color=INK, fontsize=8.5, parse_math=False)
    drawn = [seeds for arm in arms for seeds in arm.values()]
    if not drawn:
        axes.set_yticks([])
        say_empty(axes)
        return
    _scale(axes, "y", drawn)
    for index, arm in enumerate(arms):
        color, marker = _look(index)
        for point, seeds in arm.items():
            _scatter(axes, [(point, value) for value in seeds.values], seeds.diverged, color)
        points, over = list(arm), [seeds.interval for seeds in arm.values()]
        if all(math.isfinite(each.low) for each in over):
            axes.fill_between(
                points, [each.low for each in over], [each.high for each in over], color=color, alpha=0.1, linewidth=0
            )
        means = [each.mean for each in over]
        axes.plot(points, means, marker + "-", color=color, linewidth=1.6, markersize=5.5, markeredgecolor="white")


def _scatter(axes: "Axes", places: Sequence[tuple[float, float]], diverged: Sequence[bool], color: str) -> None:
    for (x, y), lost in zip(places, diverged, strict=True):
        # A cross is so large that it sticks out from under the mean of one seed.
        marker, reach, edge, alpha = ("x", 2 * _SEED_SIZE, 1.2, 0.7) if lost else ("o", _SEED_SIZE, 0, 0.4)
        axes.plot(x, y, marker, color=color, alpha=alpha, markersize=reach, markeredgewidth=edge)


def _draw_legend(figure: "Figure", sheet: StudySheet, arms: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    looks = [_look(index) for index in range(len(arms))]
    lines = [Line2D([], [], color=color, marker=marker, markeredgecolor="white") for color, marker in looks]
    legend = figure.legend(
        lines,
        arms,
        loc="upper left",
        bbox_to_anchor=(0.004, sheet.legend_top),
        ncols=sheet.legend_columns,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        borderaxespad=0,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _scale(axes: "Axes", name: Literal["x", "y"], drawn: Sequence[_Seeds]) -> None:
    """Set the scale, the ends and the numbers of the axis of values.

    All seeds are inside. Intervals may reach out: of two seeds they are so wide that nothing else could be seen.
    """
    axis = axes.xaxis if name == "x" else axes.yaxis
    values = [value for seeds in drawn for value in seeds.values]
    least, most = min(values), max(values)
    if most - least <= 1e-6 * abs(most):
        room = 0.1 * abs(most) or 1.0
        axis.set_ticks([most], [f"{most:.4g}"])
        axes.set(**{f"{name}lim": (most - room, most + room)})
        return
    log = least > 0 and most > 10 * least

    def position(value: float) -> float:
        return (math.log10(value) if value > 0 else -math.inf) if log else value

    low, high = position(least), position(most)
    spread = high - low
    intervals = [seeds.interval for seeds in drawn if len(seeds.values) > 1]
    low = max(low - spread / 2, min([low, *(position(each.low) for each in intervals)])) - _MARGIN * spread
    high = min(high + spread / 2, max([high, *(position(each.high) for each in intervals)])) + _MARGIN * spread
    if log:
        axes.set(**{f"{name}scale": "log", f"{name}lim": (10**low, 10**high)})
        number_log_axis(axis, _between(high - low))
    else:
        axes.set(**{f"{name}lim": (low, high)})
        axes.locator_params(axis=name, nbins=5 if name == "x" else 7)
        axes.ticklabel_format(axis=name, useOffset=False)


def _between(decades: float) -> tuple[float, ...]:
    """Which multiples of powers of ten a logarithmic axis has room to name."""
    return (2, 5) if decades < 2 else (3,) if decades < 3 else ()


def _spread(values: Sequence[float]) -> list[float]:
    """Those values of the grid that can be named side by side on a logarithmic axis."""
    span = math.log(values[-1] / values[0])
    kept = [values[0]]
    for value in values[1:]:
        if math.log(value / kept[-1]) >= _TICK_WIDTH * span:
            kept.append(value)
    return kept
