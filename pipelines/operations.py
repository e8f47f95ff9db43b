"""Events of operations: of workers, checkpoints and the tracking server. Imports no torch and no ray.

Whoever notices one writes it down, in whatever process that is: Ray Train's controller, the driver, the worker of rank
0. What became of it is known when training, or delivery, has gone on.
"""

from collections.abc import Collection
from pathlib import Path

from pipelines.run_folder import RunFolder
from pipelines.spike_event import Action, Kind, SpikeEvent, SpikeOutcome, State, add_event, add_outcome, read_events
from pipelines.spool import REWIND, TRAIN, Record, records_of_step

FAILURES: tuple[Kind, ...] = ("worker_death", "worker_error", "worker_stall", "checkpoint_damaged")
"""What stops training: it has gone on when it is as far as it was."""

UNSAVED: tuple[Kind, ...] = ("checkpoint_failed",)
"""What the next checkpoint makes good."""

# The end of a spool in which the last step is looked for.
_TAIL_BYTES = 1 << 20


def record_operation(folder: RunFolder, kind: Kind, action: Action, detail: str) -> None:
    """Write down an event of operations, at the last step that has been recorded.

    What cannot be written is logged, as of every event.
    """
    events = read_events(folder.events)
    step = last_step(folder.spool)
    known = {event.id for event in events}
    # One step may see several of a kind, such as workers that die before they have trained a step.
    base = f"{kind}-{step:06}"
    numbered = (f"{base}-{number}" for number in range(2, len(known) + 3))
    identity = base if base not in known else next(name for name in numbered if name not in known)
    timeline = sum(event.rewound_to is not None for event in events)
    add_event(
        folder.events,
        SpikeEvent(id=identity, kind=kind, step=step, timeline=timeline, action=action, detail=detail),
    )


def open_operations(folder: RunFolder, kinds: Collection[Kind]) -> list[SpikeEvent]:
    """The events of these kinds of which it is not known yet what became of them."""
    return [event for event in read_events(folder.events) if event.kind in kinds and event.outcome is None]


def settle(
    folder: RunFolder, kinds: Collection[Kind], at_step: int, *, state: State = "recovered", now_ms: int | None = None
) -> None:
    """Write down what became of all open events of these kinds.

    Args:
        folder: the run.
        kinds: which events.
        at_step: optimizer steps done by now.
        state: what became of them.
        now_ms: the time in milliseconds since 1970, if training stood still until now: the seconds are lost since the
            last step that was done before, of a damaged checkpoint since it was found. They may overlap.
    """
    for event in open_operations(folder, kinds):
        lost = 0.0 if now_ms is None else max(0, now_ms - _since_ms(folder, event)) / 1000
        add_outcome(folder.events, event.id, SpikeOutcome(state=state, at_step=at_step, seconds_lost=round(lost, 3)))


def _since_ms(folder: RunFolder, event: SpikeEvent) -> int:
    if event.kind == "checkpoint_damaged":
        return event.time_ms
    times = [record.time_ms for record in records_of_step(folder.spool, event.step) if record.kind == TRAIN]
    return min([*times, event.time_ms])


def last_step(spool: Path) -> int:
    """Optimizer steps done by the last record of a spool, 0 without one. Reads its end alone."""
    try:
        with spool.open("rb") as file:
            file.seek(max(0, spool.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            record = Record.from_line(line)
        except (ValueError, KeyError):
            continue  # a killed writer has left it torn, or the end begins in its middle
        if record.kind in (TRAIN, REWIND):
            return record.step
    return 0
