"""How all figures of a comparison look: colours, fonts, axes, and what a diverged run is drawn with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.flatten import Scalar
from pipelines.plotting import COLORS, GRID, INK
from tuning.comparison.comparing import Comparison
from tuning.comparison.keys import shown
from tuning.comparison.runs import ComparedRun

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LOST = "#c1121f"
"""Of all that marks what went wrong: spikes and divergences."""
DIVERGED_MARK = "x"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
# Of the scale that many configurations are coloured by; the rest of it is too pale for lines.
_SCALE_END = 0.9


def colours(number: int) -> list[str]:
    """So many colours by rank: easy to tell apart up to ten, and a scale from the best (dark) to the worst beyond."""
    if number <= len(COLORS):
        return list(COLORS[:number])
    from plotly.colors import sample_colorscale

    return list(sample_colorscale("Viridis", [_SCALE_END * place / (number - 1) for place in range(number)]))


def colour_by_run(comparison: Comparison) -> dict[str, str]:
    """The colour of each run's configuration, by the run's id."""
    by_rank = colours(len(comparison.configurations))
    return {id_: by_rank[number - 1] for id_, number in comparison.number_of.items()}


def settings_in_words(comparison: Comparison, settings: Sequence[tuple[str, Scalar]]) -> str:
    """Short names and values of some keys."""
    return ", ".join(f"{comparison.short[key]} {shown(value)}" for key, value in settings)


def about(comparison: Comparison, run: ComparedRun) -> str:
    """What a run is, when the mouse is over it: name, seed, configuration, how it ended."""
    each = comparison.configurations[comparison.number_of[run.info.id] - 1]
    words = [f"{key} {shown(value)}" for key, value in each.values.items()]
    return "<br>".join([f"<b>#{each.number} {run.info.name}</b>, seed {run.seed}", *words, run.words])


def figure_of(height: int, **layout: Any) -> "Figure":
    """An empty figure in the common look, so many pixels high."""
    from plotly.graph_objects import Figure

    figure = Figure()
    dress(figure, height, **layout)
    return figure


def dress(figure: "Figure", height: int, **layout: Any) -> None:
    """Give a figure the common look."""
    figure.update_layout(
        height=height,
        font={"family": FONT, "size": 13, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin={"l": 70, "r": 20, "t": 30, "b": 55},
        hoverlabel={"align": "left", "bgcolor": "white", "font": {"size": 12, "color": INK}},
        legend={"font": {"size": 12}, "tracegroupgap": 2},
    )
    figure.update_layout(**layout)
    common = {"gridcolor": GRID, "linecolor": GRID, "zeroline": False, "ticks": "", "automargin": True}
    figure.update_xaxes(**common)
    figure.update_yaxes(**common)
    # Titles of panels.
    figure.update_annotations(font={"size": 13, "color": INK})


def padded(low: float, high: float, share: float = 0.05) -> tuple[float, float]:
    """A range with some room at both ends."""
    room = share * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def band_for_diverged(figure: "Figure", low: float, high: float, share: float, **where: int) -> float:
    """Put a band for what diverged above the values of an axis, with a line below it; its height.

    Args:
        figure: with its axes.
        low: where the values begin.
        high: where they end.
        share: height of the band, as a share of theirs.
        where: ``row`` and ``col`` of a panel.
    """
    from matplotlib.ticker import MaxNLocator

    height = share * (high - low)
    ticks = [float(tick) for tick in MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high]
    texts = [f"{tick:.6g}" for tick in ticks]
    figure.update_yaxes(
        range=[low, high + height],
        tickmode="array",
        tickvals=[*ticks, high + height / 2],
        ticktext=[*texts, f"<span style='color:{LOST}'>diverged</span>"],
        **where,
    )
    figure.add_hline(y=high, line={"color": LOST, "width": 1, "dash": "dot"}, **where)
    return height
