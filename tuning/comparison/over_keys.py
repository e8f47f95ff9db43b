"""Figures with the keys on their axes: the loss over each numeric key, parallel coordinates, importance."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pipelines.flatten import Scalar
from pipelines.plotting import BLUE, INK
from tuning.comparison.comparing import Comparison, Configuration
from tuning.comparison.importance import Importances
from tuning.comparison.keys import is_numeric, shown
from tuning.comparison.runs import ComparedRun
from tuning.comparison.style import (
    DIVERGED_MARK,
    LOST,
    about,
    band_for_diverged,
    colour_by_run,
    colours,
    figure_of,
    padded,
    settings_in_words,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Of the height of the values: what diverged is drawn in a band above them.
_BAND = 0.16
# So many settings of the other keys get a line each; more, and it is points in the colours of the configurations.
_MOST_LINES = 10
_DECADE = 4.0


def numeric_keys(comparison: Comparison) -> list[str]:
    """The keys that vary and are numbers, the learning rate first."""
    settings = [run.settings for run in comparison.runs]
    found = [key for key in comparison.keys if is_numeric(key, settings)]
    return sorted(found, key=lambda key: key != "optimizer.lr")


def sensitivity_figure(comparison: Comparison, key: str) -> "Figure":
    """Final validation loss over a numeric key; a line for each setting of the others; diverged runs at the top."""
    lines = _lines(comparison, key)
    losses = [loss for line in lines for point in line.points for loss in point.losses.values()]
    low, high = padded(min(losses, default=0.0), max(losses, default=1.0))
    figure = figure_of(450, hovermode="closest")
    figure.update_layout(margin={"t": 60})
    figure.update_yaxes(title_text="validation loss, nats per token", range=[low, high])
    # With too many for a colour each, those of the configurations say more.
    joined = len(lines) <= _MOST_LINES
    for number, line in enumerate(lines):
        _draw_line(figure, comparison, line, colours(len(lines))[number] if joined else None)
    settings = [run.settings for run in comparison.runs if key in run.settings]
    values = sorted({float(each[key] or 0) for each in settings})
    log = values[0] > 0 and values[-1] >= _DECADE * values[0]
    _number_axis(figure, key, values, log)
    losing = [line for line in lines if any(point.diverged for point in line.points)]
    if losing:
        band = band_for_diverged(figure, low, high, _BAND)
        for place, line in enumerate(losing):
            colour = colours(len(lines))[lines.index(line)] if joined else None
            _draw_diverged(figure, comparison, line, colour, high + band * (place + 0.5) / len(losing))
        if len(values) <= _MOST_LINES:
            _count_diverged(figure, [point for line in lines for point in line.points], high + band, log)
    return figure


@dataclass(frozen=True)
class _Point:
    """One configuration on a line."""

    value: float
    configuration: Configuration

    @property
    def losses(self) -> Mapping[int, float]:
        return self.configuration.losses

    @property
    def diverged(self) -> int:
        return self.configuration.diverged


@dataclass(frozen=True)
class _Line:
    """Configurations that differ in one key alone."""

    name: str
    points: Sequence[_Point]
    """Rising by value."""


def _lines(comparison: Comparison, key: str) -> list[_Line]:
    found: dict[tuple[tuple[str, Scalar], ...], list[_Point]] = {}
    for each in comparison.configurations:
        if key in each.values:
            others = tuple((other, value) for other, value in each.values.items() if other != key)
            found.setdefault(others, []).append(_Point(float(each.values[key] or 0), each))
    return [
        _Line(settings_in_words(comparison, others), sorted(points, key=lambda point: point.value))
        for others, points in found.items()
    ]


def _draw_line(figure: "Figure", comparison: Comparison, line: _Line, colour: str | None) -> None:
    from plotly.graph_objects import Scatter

    by_run = colour_by_run(comparison)
    measured = [point for point in line.points if point.losses]
    own = [colour or by_run[point.configuration.runs[0].info.id] for point in measured]
    named = {"name": line.name or "all runs", "legendgroup": line.name, "showlegend": False}
    figure.add_trace(
        Scatter(
            x=[point.value for point in measured],
            y=[fmean(point.losses.values()) for point in measured],
            mode="lines+markers" if colour else "markers",
            line={"color": colour, "width": 2},
            marker={"size": 9, "color": own, "line": {"color": "white", "width": 1}},
            text=[_of_mean(point.configuration) for point in measured],
            hovertemplate="%{text}<extra></extra>",
            **{**named, "showlegend": bool(colour and line.name and measured)},
        )
    )
    seeds = [(point, run) for point in measured if len(point.losses) > 1 for run in point.configuration.runs]
    dots = [(point, run, loss) for point, run in seeds if (loss := comparison.loss(run)) is not None]
    figure.add_trace(
        Scatter(
            x=[point.value for point, _, _ in dots],
            y=[loss for _, _, loss in dots],
            mode="markers",
            marker={"size": 5, "color": [colour or by_run[run.info.id] for _, run, _ in dots], "opacity": 0.45},
            text=[about(comparison, run) for _, run, _ in dots],
            hovertemplate="%{text}<br>%{y:.4f}<extra></extra>",
            **named,
        )
    )


def _draw_diverged(figure: "Figure", comparison: Comparison, line: _Line, colour: str | None, level: float) -> None:
    """Crosses at the top, those of a line at a height of their own."""
    from plotly.graph_objects import Scatter

    by_run = colour_by_run(comparison)
    lost = [point for point in line.points if point.diverged]
    figure.add_trace(
        Scatter(
            x=[point.value for point in lost],
            y=[level] * len(lost),
            mode="markers",
            marker={
                "symbol": DIVERGED_MARK,
                "size": 8,
                "color": [colour or by_run[point.configuration.runs[0].info.id] for point in lost],
                "line": {"color": LOST, "width": 1},
            },
            text=[_of_diverged(point.configuration) for point in lost],
            hovertemplate="%{text}<extra></extra>",
            name=line.name or "all runs",
            legendgroup=line.name,
            showlegend=bool(colour and line.name and not any(point.losses for point in line.points)),
        )
    )


def _count_diverged(figure: "Figure", points: Sequence[_Point], top: float, log: bool) -> None:
    """How many runs with each value diverged, above its crosses."""
    by_value: dict[float, list[_Point]] = {}
    for point in points:
        by_value.setdefault(point.value, []).append(point)
    lost = {value: sum(point.diverged for point in each) for value, each in by_value.items()}
    for value in (value for value in sorted(lost) if lost[value]):
        runs = sum(len(point.configuration.runs) for point in by_value[value])
        figure.add_annotation(
            x=math.log10(value) if log else value,
            y=top,
            yanchor="bottom",
            text=f"{lost[value]} of {runs} runs",
            showarrow=False,
            font={"size": 11, "color": LOST},
        )


def _of_mean(each: Configuration) -> str:
    loss = each.loss
    assert loss is not None
    spread = f" ± {(loss.high - loss.low) / 2:.4f}" if loss.n > 1 else ""
    return f"<b>{each.name}</b><br>validation loss {loss.mean:.4f}{spread} ({loss.n} of {len(each.runs)} runs)"


def _of_diverged(each: Configuration) -> str:
    words = [f"{run.info.name}, seed {run.seed}: {run.words}" for run in each.runs if run.state == "diverged"]
    return "<br>".join([f"<b>{each.name}</b>", *words])


def _number_axis(figure: "Figure", key: str, values: Sequence[float], log: bool) -> None:
    """Name all values that were tried, if they are few; on a logarithmic axis with room at both ends."""
    ends = (math.log10(values[0]), math.log10(values[-1])) if log else (values[0], values[-1])
    figure.update_xaxes(title_text=key, type="log" if log else "linear", range=padded(*ends, 0.06))
    if len(values) <= _MOST_LINES:
        figure.update_xaxes(tickmode="array", tickvals=values, ticktext=[shown(value) for value in values])
    elif log:
        figure.update_xaxes(dtick="D2", exponentformat="e")


@dataclass(frozen=True)
class _Axis:
    """One of the parallel axes: where a run lies on it, from 0 to 1, and what is written beside it."""

    title: str
    place: Callable[[ComparedRun], float]
    ticks: Mapping[float, str]


# Where a run without the key, or without the figure, is drawn; and one that diverged.
_NONE, _TOP = -0.12, 1.12


def parallel_figure(comparison: Comparison) -> "Figure":
    """A line for each run through the keys that vary and what became of it; diverged runs reach the top, dotted.

    Of lines in the drawing itself rather than plotly's own kind, which needs WebGL and tells no run's name.
    """
    from plotly.graph_objects import Scatter

    axes = [_key_axis(comparison, key) for key in comparison.keys] + _outcome_axes(comparison)
    colour = colour_by_run(comparison)
    figure = figure_of(480, hovermode="closest", showlegend=False)
    ranked = sorted(comparison.runs, key=lambda run: -comparison.number_of[run.info.id])
    for run in ranked:
        best = comparison.reference is not None and run in comparison.reference.runs
        lost = run.state == "diverged"
        figure.add_trace(
            Scatter(
                x=list(range(len(axes))),
                y=[axis.place(run) for axis in axes],
                mode="lines+markers",
                line={
                    "color": colour[run.info.id],
                    "width": 3 if best else 1.3,
                    "dash": "dot" if lost else "solid",
                },
                marker={"size": 6, "symbol": DIVERGED_MARK if lost else "circle"},
                opacity=1.0 if best else 0.75,
                hovertemplate=about(comparison, run) + "<br>" + _figures(comparison, run) + "<extra></extra>",
            )
        )
    for number, axis in enumerate(axes):
        figure.add_shape(type="line", x0=number, x1=number, y0=0, y1=1, line={"color": INK, "width": 1}, layer="below")
        for place, text in axis.ticks.items():
            figure.add_annotation(
                x=number,
                y=place,
                text=text,
                showarrow=False,
                xanchor="right",
                xshift=-5,
                font={"size": 11, "color": LOST if place == _TOP else INK},
                bgcolor="rgba(255,255,255,0.8)",
            )
    figure.update_xaxes(
        tickmode="array",
        tickvals=list(range(len(axes))),
        ticktext=[axis.title for axis in axes],
        side="top",
        showgrid=False,
        range=[-0.45, len(axes) - 0.8],
    )
    lowest = min((place for axis in axes for place in axis.ticks), default=0.0)
    figure.update_yaxes(visible=False, range=[lowest - 0.05, 1.2])
    figure.update_layout(margin={"t": 60, "b": 20, "l": 20})
    return figure


def _key_axis(comparison: Comparison, key: str) -> _Axis:
    settings = [run.settings for run in comparison.runs]
    values = list(dict.fromkeys(each[key] for each in settings if key in each))
    missing = any(key not in each for each in settings)
    if is_numeric(key, settings):
        numbers = sorted(float(value or 0) for value in values)
        log = numbers[0] > 0 and numbers[-1] >= _DECADE * numbers[0]
        scale: Callable[[float], float] = math.log10 if log else float
        low, high = scale(numbers[0]), scale(numbers[-1])
        place = {value: (scale(float(value or 0)) - low) / (high - low) for value in values}
        named = numbers if len(numbers) <= _MOST_LINES else [numbers[0], numbers[len(numbers) // 2], numbers[-1]]
        ticks = {(scale(number) - low) / (high - low): shown(number) for number in named}
    else:
        place = {value: (number + 0.5) / len(values) for number, value in enumerate(values)}
        ticks = {place[value]: shown(value) for value in values}
    if missing:
        ticks[_NONE] = "–"
    title = comparison.short[key]
    return _Axis(title, lambda run: place[run.settings[key]] if key in run.settings else _NONE, ticks)


def _outcome_axes(comparison: Comparison) -> list[_Axis]:
    tokens = comparison.tokens
    wanted: tuple[tuple[str, Callable[[ComparedRun], float | None], str], ...] = (
        ("spikes", lambda run: float(run.spikes_by(tokens)), ".0f"),
        ("steps lost", lambda run: float(run.steps_lost_by(tokens)), ".0f"),
        ("MaxVio", comparison.max_vio, ".2f"),
        ("validation loss", comparison.loss, ".3f"),
    )
    return [axis for title, figure, form in wanted if (axis := _outcome_axis(comparison, title, figure, form))]


def _outcome_axis(
    comparison: Comparison, title: str, figure: Callable[[ComparedRun], float | None], form: str
) -> _Axis | None:
    known = [value for run in comparison.runs if (value := figure(run)) is not None]
    if not known or (max(known) == min(known) and title != "validation loss"):
        return None
    low, high = min(known), max(known)

    def place(run: ComparedRun) -> float:
        value = figure(run)
        if value is None:
            return _TOP if run.state == "diverged" else _NONE
        return (value - low) / (high - low) if high > low else 0.5

    middle = (low + high) / 2
    ticks = {0.0: format(low, form), 1.0: format(high, form)} if high > low else {}
    # No half a spike.
    if not form.endswith("0f") or middle.is_integer():
        ticks[0.5] = format(middle, form)
    places = {place(run) for run in comparison.runs}
    return _Axis(title, place, ticks | {at: word for at, word in ((_TOP, "diverged"), (_NONE, "–")) if at in places})


def _figures(comparison: Comparison, run: ComparedRun) -> str:
    loss, max_vio = comparison.loss(run), comparison.max_vio(run)
    parts = [f"validation loss {loss:.4f}"] if loss is not None else []
    parts += [f"MaxVio {max_vio:.3f}"] if max_vio is not None else []
    spikes, lost = run.spikes_by(comparison.tokens), run.steps_lost_by(comparison.tokens)
    return ", ".join([*parts, f"{spikes} spikes", f"{lost} steps lost"])


def importance_figure(found: Importances) -> "Figure":
    """A bar for each key."""
    from plotly.graph_objects import Bar

    keys = list(reversed(found.keys))
    bar: dict[str, Any] = {"type": "data", "array": [each.spread for each in keys], "color": INK, "thickness": 1.2}
    figure = figure_of(110 + 38 * len(keys), showlegend=False)
    figure.add_trace(
        Bar(
            x=[each.mean for each in keys],
            y=[each.key for each in keys],
            orientation="h",
            marker={"color": BLUE},
            error_x=bar,
            hovertemplate="%{y}: %{x:.2f} ± %{error_x.array:.2f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="squared error that shuffling the key adds, in variances of the loss")
    figure.update_xaxes(zeroline=True, zerolinecolor=INK)
    return figure
