"""Loss against stability: which configurations nothing beats in both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from pipelines.plotting import INK
from tuning.comparison.comparing import Comparison, Configuration
from tuning.comparison.style import DIVERGED_MARK, LOST, band_for_diverged, colours, dress, padded

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_BAND = 0.14


@dataclass(frozen=True)
class Stability:
    """A measure of stability that is to be small."""

    name: str
    of: Callable[[Configuration], float | None]
    """Mean over the runs of a configuration; None if it has no such figure."""


def stabilities(comparison: Comparison) -> list[Stability]:
    """Those in which the configurations differ."""
    tokens = comparison.tokens

    def max_vio(each: Configuration) -> float | None:
        return each.max_vio.mean if each.max_vio is not None else None

    measures = (
        Stability("spikes a run", lambda each: fmean(run.spikes_by(tokens) for run in each.runs)),
        Stability("steps lost a run", lambda each: fmean(run.steps_lost_by(tokens) for run in each.runs)),
        Stability("MaxVio", max_vio),
    )
    return [
        measure for measure in measures if len({measure.of(each) for each in comparison.configurations} - {None}) > 1
    ]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of which no other is as small in both and smaller in one; rising in the first."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def trade_off_figure(comparison: Comparison) -> "Figure | None":
    """Validation loss over each measure of stability, a point a configuration, with the front of those without a
    diverged run; diverged ones at the top. None if the configurations do not differ in stability."""
    measures = stabilities(comparison)
    if not measures or comparison.reference is None:
        return None
    from plotly.subplots import make_subplots

    figure = make_subplots(1, len(measures), shared_yaxes=True, horizontal_spacing=0.04)
    losses = [each.loss.mean for each in comparison.configurations if each.loss is not None]
    low, high = padded(min(losses), max(losses))
    top = high + _BAND * (high - low) / 2
    for column, measure in enumerate(measures, 1):
        _draw_front(figure, comparison, measure, column)
        _draw_points(figure, comparison, measure, column, top)
        figure.update_xaxes(title_text=measure.name, row=1, col=column)
    dress(figure, 430, hovermode="closest", showlegend=False)
    figure.update_yaxes(range=[low, high])
    figure.update_yaxes(title_text="validation loss, nats per token", row=1, col=1)
    if any(each.diverged for each in comparison.configurations):
        for column in range(1, len(measures) + 1):
            band_for_diverged(figure, low, high, _BAND, row=1, col=column)
    return figure


def _draw_front(figure: "Figure", comparison: Comparison, measure: Stability, column: int) -> None:
    from plotly.graph_objects import Scatter

    best = front([place for place, _ in _points(comparison, measure)])
    trace = Scatter(
        x=[x for x, _ in best],
        y=[y for _, y in best],
        mode="lines",
        line={"color": INK, "width": 1.2, "dash": "dash", "shape": "hv"},
        hoverinfo="skip",
    )
    figure.add_trace(trace, row=1, col=column)


def _draw_points(figure: "Figure", comparison: Comparison, measure: Stability, column: int, top: float) -> None:
    from plotly.graph_objects import Scatter

    by_rank = colours(len(comparison.configurations))
    named = _named(comparison, measure)
    for each in comparison.configurations:
        stability = measure.of(each)
        # One that was only cut short has no place.
        if not each.diverged and (each.loss is None or stability is None):
            continue
        place = each.loss.mean if each.loss is not None else top
        symbol = DIVERGED_MARK if each.loss is None else "circle-x" if each.diverged else "circle"
        lost = f"<br>{each.diverged} of {len(each.runs)} runs diverged" if each.diverged else ""
        figures = f"{place:.4f}" if each.loss is not None else "none"
        known = f"{stability:.3g}" if stability is not None else "not known"
        trace = Scatter(
            x=[stability if stability is not None else _edge(comparison, measure)],
            y=[place],
            mode="markers+text" if each.number in named else "markers",
            marker={
                "symbol": symbol,
                "size": 11,
                "color": by_rank[each.number - 1],
                "line": {"color": LOST if each.diverged else "white", "width": 1.2},
            },
            text=[f"#{each.number}"],
            textposition="top center",
            textfont={"size": 10},
            hovertemplate=f"<b>{each.name}</b><br>{measure.name} {known}<br>"
            f"validation loss {figures}{lost}<extra></extra>",
        )
        figure.add_trace(trace, row=1, col=column)


def _named(comparison: Comparison, measure: Stability) -> set[int]:
    """Ranks of those that are called by them: those on the front. Of the others the mouse tells."""
    points = _points(comparison, measure)
    best = set(front([place for place, _ in points]))
    return {each.number for place, each in points if place in best}


def _points(comparison: Comparison, measure: Stability) -> list[tuple[tuple[float, float], Configuration]]:
    """Stability and loss of the configurations that the front is made of."""
    return [
        ((stability, each.loss.mean), each)
        for each in comparison.configurations
        if each.loss is not None and not each.diverged and (stability := measure.of(each)) is not None
    ]


def _edge(comparison: Comparison, measure: Stability) -> float:
    """Where one without the figure is drawn: as far out as the worst."""
    return max(value for each in comparison.configurations if (value := measure.of(each)) is not None)
