"""Loss over training tokens, with the spikes marked; and MaxVio layer by layer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipelines import spike_words
from tuning.comparison.comparing import Comparison, Configuration
from tuning.comparison.runs import ComparedRun, smoothed, thinned
from tuning.comparison.style import LOST, about, colour_by_run, dress, padded

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SMOOTHING = 0.03
"""Of a run's steps: the training loss is the mean over the last so many."""

_POINTS = 400
_LAYER_METRIC = "moe_max_vio/layer_"
_COLUMNS = 160
_LEGEND_LENGTH = 48


def loss_figure(comparison: Comparison) -> "Figure":
    """Training loss with spikes, above the validation loss, over tokens; runs of a configuration have its colour."""
    from plotly.subplots import make_subplots

    titles = ("Training loss (mean over the last 3 % of the steps); ▲ a spike", "Validation loss")
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.09, subplot_titles=titles)
    colours, top = colour_by_run(comparison), _top(comparison)
    for each in comparison.configurations:
        for number, run in enumerate(each.runs):
            _draw_run(figure, comparison, run, colours[run.info.id], _legend_name(each) if number == 0 else None)
    for run in comparison.runs:
        _mark_spikes(figure, comparison, run, top)
    figure.update_yaxes(title_text="nats per token")
    figure.update_xaxes(title_text="training tokens", row=2, col=1)
    for row, metric, high in ((1, "train/loss", top), (2, "val/loss", _first_validations(comparison, top))):
        lows = [min(values) for run in comparison.runs if (values := run.curve(metric)[1])]
        if lows:
            figure.update_yaxes(range=padded(min(lows), high, 0.05), row=row, col=1)
    dress(figure, 720, hovermode="closest")
    figure.update_annotations(x=0, xanchor="left")
    return figure


def _top(comparison: Comparison) -> float:
    """The loss before training: what lies above is of runs that diverged, and would flatten all others."""
    known = [loss for run in comparison.runs if (loss := run.untrained_loss) is not None]
    return max(known, default=1.0)


def _first_validations(comparison: Comparison, most: float) -> float:
    """The greatest of the finished runs' first validation losses, at most that before training."""
    firsts = [values[0] for run in comparison.finished if (values := run.curve("val/loss")[1])]
    return min(max(firsts, default=most), most)


def _legend_name(each: Configuration) -> str:
    """The whole of it is told by the mouse: it would take the room of the curves."""
    return each.name if len(each.name) <= _LEGEND_LENGTH else f"{each.name[: _LEGEND_LENGTH - 1]}…"


def _draw_run(figure: "Figure", comparison: Comparison, run: ComparedRun, colour: str, name: str | None) -> None:
    from plotly.graph_objects import Scatter

    group = str(comparison.number_of[run.info.id])
    is_best = comparison.reference is not None and run in comparison.reference.runs
    line = {"color": colour, "width": 2.4 if is_best else 1.2, "dash": "dot" if run.state == "diverged" else "solid"}
    hover = about(comparison, run) + "<br>%{y:.4f} after %{x:,} tokens<extra></extra>"
    for row, metric, mode in ((1, "train/loss", "lines"), (2, "val/loss", "lines+markers")):
        places, values = run.curve(metric)
        if row == 1:
            places, values = thinned(places, smoothed(values, SMOOTHING), _POINTS)
        trace = Scatter(
            x=places,
            y=values,
            mode=mode,
            name=name,
            legendgroup=group,
            showlegend=name is not None and row == 1,
            line=line,
            marker={"size": 5},
            opacity=0.85,
            hovertemplate=hover,
        )
        figure.add_trace(trace, row=row, col=1)
    if run.state == "diverged":
        _mark_end(figure, comparison, run, colour)


def _mark_end(figure: "Figure", comparison: Comparison, run: ComparedRun, colour: str) -> None:
    """A cross where a diverged run ends: its curve may have no point in sight."""
    from plotly.graph_objects import Scatter

    _, values = run.curve("train/loss")
    top = _top(comparison)
    figure.add_trace(
        Scatter(
            x=[run.tokens],
            y=[min(values[-1], top) if values else top],
            mode="markers",
            marker={"symbol": "x", "size": 8, "color": colour, "line": {"color": LOST, "width": 1}},
            legendgroup=str(comparison.number_of[run.info.id]),
            showlegend=False,
            hovertemplate=about(comparison, run) + "<extra></extra>",
        ),
        row=1,
        col=1,
    )


def _mark_spikes(figure: "Figure", comparison: Comparison, run: ComparedRun, top: float) -> None:
    from plotly.graph_objects import Scatter

    events = [event for event in run.events if event.is_training]
    if not events:
        return
    losses = dict(zip(*_steps_and_losses(run), strict=True))
    x, y, texts = [], [], []
    for event in events:
        value = event.value if event.kind == "loss" else None
        seen = value if value is not None else event.metrics.get("train/loss", losses.get(event.step, top))
        x.append(run.timeline.tokens_before(event.step))
        y.append(min(seen, top))
        texts.append(f"{spike_words.what(event)}<br>{spike_words.answer(event)}<br>{spike_words.outcome(event)}")
    figure.add_trace(
        Scatter(
            x=x,
            y=y,
            mode="markers",
            marker={"symbol": "triangle-up", "size": 9, "color": LOST, "line": {"color": "white", "width": 0.8}},
            legendgroup=str(comparison.number_of[run.info.id]),
            showlegend=False,
            text=texts,
            hovertemplate=f"<b>{run.info.name}</b><br>%{{text}}<extra></extra>",
        ),
        row=1,
        col=1,
    )


def _steps_and_losses(run: ComparedRun) -> tuple[list[int], list[float]]:
    series = run.history.series.get("train/loss")
    return ([], []) if series is None else (series.steps, series.values)


def layer_figure(comparison: Comparison) -> tuple["Figure | None", str]:
    """MaxVio by layer and training tokens, of the best and the worst runs that recorded it; and what to know of it.

    None if no run has: it takes ``tracking.per_layer``.
    """
    chosen = _best_and_worst(comparison)
    if not chosen:
        return None, "No run has recorded MaxVio by layer; tracking.per_layer=true does."
    from plotly.graph_objects import Heatmap
    from plotly.subplots import make_subplots

    titles = [f"{words}: #{comparison.number_of[run.info.id]} {run.info.name}" for words, run in chosen]
    figure = make_subplots(
        len(chosen), 1, subplot_titles=titles, shared_xaxes=True, vertical_spacing=0.24 / len(chosen)
    )
    most = max(float(np.percentile(_layers(run)[1], 99)) for _, run in chosen)
    for row, (_, run) in enumerate(chosen, 1):
        tokens, rows = _layers(run)
        heat = Heatmap(
            x=tokens,
            y=[f"layer {number}" for number in _layer_numbers(run)],
            z=rows,
            zmin=0,
            zmax=most,
            colorscale="YlOrRd",
            colorbar={"title": {"text": "MaxVio"}, "thickness": 14},
            showscale=row == 1,
            hovertemplate="%{y}, %{x:,} tokens: MaxVio %{z:.2f}<extra></extra>",
        )
        figure.add_trace(heat, row=row, col=1)
    longest = max(run.tokens for _, run in chosen)
    figure.update_xaxes(range=[0, longest])
    figure.update_xaxes(title_text="training tokens", row=len(chosen), col=1)
    layers = max(len(_layer_numbers(run)) for _, run in chosen)
    dress(figure, 70 + len(chosen) * (90 + min(26 * layers, 320)))
    figure.update_annotations(x=0, xanchor="left")
    without = sum(not _layer_numbers(run) for run in comparison.runs)
    words = "Of each step's batch, averaged over neighbouring steps; the colours are the same in all panels."
    return figure, words + (f" {without} of {len(comparison.runs)} runs have no record by layer." if without else "")


def _best_and_worst(comparison: Comparison) -> list[tuple[str, ComparedRun]]:
    recorded = [run for run in comparison.runs if _layer_numbers(run)]
    losses = {run.info.id: loss for run in recorded if (loss := comparison.loss(run)) is not None}
    finished = sorted((run for run in recorded if run.info.id in losses), key=lambda run: losses[run.info.id])
    chosen = [("Least validation loss", finished[0])] if finished else []
    chosen += [("Greatest validation loss", finished[-1])] if len(finished) > 1 else []
    diverged = [run for run in recorded if run.state == "diverged"]
    # The longest shows most of how it came to that.
    longest = max(diverged, key=lambda run: run.tokens, default=None)
    chosen += [(longest.words.capitalize(), longest)] if longest is not None else []
    return chosen or [("Not trained to its end", run) for run in recorded[:1]]


def _layer_numbers(run: ComparedRun) -> Sequence[str]:
    return sorted(name.removeprefix(_LAYER_METRIC) for name in run.history.series if name.startswith(_LAYER_METRIC))


def _layers(run: ComparedRun) -> tuple[list[int], list[list[float]]]:
    """Tokens, and of each layer the means over as many stretches of steps as there are columns."""
    rows: list[list[float]] = []
    tokens: list[int] = []
    for number in _layer_numbers(run):
        places, values = run.curve(f"{_LAYER_METRIC}{number}")
        parts = np.array_split(np.arange(len(values)), min(_COLUMNS, len(values)))
        rows.append([float(np.mean([values[i] for i in part])) for part in parts])
        tokens = [places[part[-1]] for part in parts]
    return tokens, rows
