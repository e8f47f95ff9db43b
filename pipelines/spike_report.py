"""The report of a run's spikes: a page of Markdown among its figures, which reach MLflow. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.run_folder import RunFolder, write_whole
from pipelines.spike_event import SpikeEvent, read_events, steps_lost

FILE_NAME = "spikes.md"
_COLUMNS = ("event", "step", "kind", "value", "expected", "score", "answer", "outcome", "steps lost")
# Of an event's documents, so many are named.
_DOCUMENTS = 5


def write_spike_report(folder: RunFolder, abort_reason: str | None = None) -> Path | None:
    """Write the report; its path, None for a run without events. ``abort_reason``: why the policy has ended the run."""
    events = read_events(folder.events)
    if not events:
        return None
    path = folder.figures / FILE_NAME
    write_whole(path, spike_report(folder.info.name, events, abort_reason))
    return path


def spike_report(run: str, events: Sequence[SpikeEvent], abort_reason: str | None = None) -> str:
    """The report in Markdown."""
    lost = steps_lost(events)
    lines = [f"# Spikes of run {run}", "", f"{len(events)} events, {lost} steps lost."]
    if abort_reason is not None:
        lines += ["", f"**The run was ended:** {abort_reason}.", "", *_advice(events[-1])]
    lines += ["", f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    lines += [_row(number, event) for number, event in enumerate(events, start=1)]
    for number, event in enumerate(events, start=1):
        lines += ["", f"## {number}: {event.detail}"]
        if event.documents:
            more = len(event.documents) - _DOCUMENTS
            named = ", ".join(f"`{name}`" for name in event.documents[:_DOCUMENTS])
            lines += ["", f"Text of the batch: {named}{f' and {more} more' if more > 0 else ''}."]
        if event.layers:
            lines += ["", *_layers(event)]
    return "\n".join(lines) + "\n"


def _advice(last: SpikeEvent) -> list[str]:
    pinned = last.checkpoint or "there was none yet"
    return [
        f"The last checkpoint before it is kept ({pinned}). What usually helps, in this order: look at the text of the "
        "batches below; a lower peak `optimizer.lr` or a longer `schedule.warmup_steps`; a tighter clip "
        "(`stability.clip`); bounded activations (`model.activation`) if `expert_max` grows from event to event; "
        "anticipatory routing (`rewind_anticipate` in `response.rungs`)."
    ]


def _row(number: int, event: SpikeEvent) -> str:
    outcome = event.outcome
    cells = (
        str(number),
        str(event.step),
        event.kind,
        _figure(event.value),
        _figure(event.baseline),
        _figure(event.score),
        event.action,
        outcome.state if outcome else "",
        str(outcome.steps_lost) if outcome else "",
    )
    return f"| {' | '.join(cells)} |"


def _layers(event: SpikeEvent) -> list[str]:
    names = [name for name in type(event.layers[0]).model_fields if name != "layer"]
    rows = [
        f"| {layer.layer} | {' | '.join(_figure(getattr(layer, name)) for name in names)} |" for layer in event.layers
    ]
    return [f"| layer | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}", *rows]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
