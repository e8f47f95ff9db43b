"""What the pictures have in common: colours, the frame of a panel, numbers on logarithmic axes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

INK, GRID = "#22303c", "#e3e7eb"
BLUE, ORANGE, GREEN, VIOLET = "#2f6fb0", "#e07b39", "#3a9d6e", "#7b5ea7"
COLORS = (BLUE, ORANGE, GREEN, VIOLET, "#c43d4b", "#1fa3b5", "#8a6d3b", "#d36ba6", "#5b6770", "#a8a013")
"""Ten that are easy to tell apart."""
WIDTH, DPI = 10.0, 160
"""Inches and dots per inch: pictures of 1600 pixels."""


def frame(axes: "Axes", title: str) -> None:
    """A panel's title, grid and spines."""
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=INK, labelsize=8.5, length=0)


def say_empty(axes: "Axes") -> None:
    """A word in a panel that has nothing to show."""
    axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=INK, alpha=0.5)


def number_log_axis(axis: "Axis", between: Sequence[float] = (2, 5)) -> None:
    """Write the numbers of a logarithmic axis out, the powers of ten and these multiples of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axis_format in (axis.set_major_formatter, axis.set_minor_formatter):
        axis_format(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_tick_params(which="minor", colors=INK, labelsize=8.5, length=0)
    axis.set_minor_locator(LogLocator(subs=between) if between else NullLocator())


def short_number(value: float, digits: int = 6) -> str:
    """The shorter of 0.03 and 3e-4, with at most so many significant digits."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    scientific = f"{float(mantissa):g}e{int(exponent)}"
    return min(f"{value:.{digits}g}", scientific, key=len)
