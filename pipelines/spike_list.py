"""The spike events of a run as a list, for people and for scripts. Imports none of torch, ray and mlflow."""

import difflib
import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

from pipelines.errors import UserError
from pipelines.run_folder import RunFolder
from pipelines.spike_event import SpikeEvent, read_events
from pipelines.spike_words import counted, short_outcome, spikes_in_words
from pipelines.terminal import list_console, print_line

_LISTED = 10
_COLUMNS = ("", "id", "step", "kind", "value (usual)", "score", "action", "outcome", "steps lost")
# Columns that give way in a narrow terminal, and how far: loss-000123, the longest words of the others.
_BREAKABLE = {"id": 11, "kind": 10, "value (usual)": 7, "action": 10, "steps lost": 5}
_NUMBERS = ("", "step", "value (usual)", "score", "steps lost")


def print_events(folder: RunFolder, console: Console | None = None) -> None:
    """Print a table of all events of a run."""
    console = console or list_console()
    name, events = folder.info.name, read_events(folder.events)
    if not events:
        print_line(console, f"Nothing went wrong in run {name} so far.")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in _COLUMNS:
        justify: JustifyMethod = "right" if column in _NUMBERS else "left"
        least = _BREAKABLE.get(column)
        table.add_column(column, justify=justify, no_wrap=least is None, min_width=least, overflow="fold")
    for number, event in enumerate(events, 1):
        table.add_row(str(number), *_cells(event))
    console.print(table)
    summary = spikes_in_words(events) or f"{counted(len(events), 'event')}, none of them a spike."
    print_line(console, f"{summary} One of them in full: steadymoe spikes {name} 1")


def _cells(event: SpikeEvent) -> list[str]:
    lost = event.outcome.steps_lost if event.outcome else 0
    expected = f" ({event.baseline:.4g})" if event.baseline is not None else ""
    return [
        event.id,
        f"{event.step:,}",
        # In words, which a narrow terminal can break.
        event.kind.replace("_", " "),
        f"{event.value:.4g}{expected}" if event.value is not None else "",
        f"{event.score:.1f}" if event.score is not None else "",
        event.action.replace("_", " "),
        short_outcome(event),
        f"{lost:,}" if lost else "",
    ]


def events_as_json(events: Sequence[SpikeEvent]) -> str:
    """All that is recorded of a run's events, as a JSON list; each with its number."""
    return json.dumps([_as_dict(number, event) for number, event in enumerate(events, 1)], ensure_ascii=False, indent=1)


def event_as_json(number: int, event: SpikeEvent) -> str:
    """All that is recorded of one event, as a JSON object."""
    return json.dumps(_as_dict(number, event), ensure_ascii=False, indent=1)


def _as_dict(number: int, event: SpikeEvent) -> dict[str, Any]:
    return {"number": number, **event.model_dump(mode="json")}


def find_event(folder: RunFolder, wanted: str) -> tuple[int, SpikeEvent]:
    """The event that a user means by its number in the list, from 1, or by its id; with its number.

    Raises:
        UserError: the run has no such event.
    """
    events = read_events(folder.events)
    for number, event in enumerate(events, 1):
        if wanted in (str(number), event.id):
            return number, event
    name = folder.info.name
    if not events:
        raise UserError(f"event {wanted}: run {name} has no events")
    ids = [event.id for event in events]
    if near := difflib.get_close_matches(wanted, ids, n=3):
        raise UserError(f"event {wanted}: run {name} has no such event; did you mean {' or '.join(near)}?")
    there = ", ".join(f"{number} ({id_})" for number, id_ in list(enumerate(ids, 1))[:_LISTED])
    more = f" and {len(ids) - _LISTED:,} more" if len(ids) > _LISTED else ""
    raise UserError(f"event {wanted}: run {name} has no such event; it has {there}{more}")
