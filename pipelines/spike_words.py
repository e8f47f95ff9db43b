"""Spike events in words, for whoever reads of one: in MLflow, in a terminal, in a run's description."""

from collections import Counter
from collections.abc import Iterable

from pipelines.spike_event import Action, Kind, SpikeEvent, State, steps_lost

KINDS: dict[Kind, str] = {
    "loss": "loss spike",
    "grad_norm": "gradient norm spike",
    "non_finite": "loss or gradient not finite",
    "replica_mismatch": "replicas differ",
    "worker_death": "a worker died",
    "worker_error": "a worker failed",
    "worker_stall": "a worker stalled",
    "checkpoint_damaged": "a checkpoint is damaged",
    "checkpoint_failed": "a checkpoint could not be written",
    "tracking_outage": "the tracking server was away",
}
"""What was noticed."""

_ACTIONS: dict[Action, str] = {
    "record": "recorded, and the step taken",
    "skip_step": "the step's update refused",
    "rewind": "training went back",
    "rewind_skip_samples": "training went back, and leaves the samples since the onset out",
    "rewind_anticipate": "training went back, and anticipates the routing",
    "rewind_lower_lr": "training went back, at a lower learning rate",
    "abort": "the run was ended",
    "restart_workers": "the workers were started again",
    "use_older_checkpoint": "an older checkpoint was taken",
    "go_on": "training went on without it",
}

_STATES: dict[State, str] = {
    "open": "not known yet what becomes of it",
    "recovered": "recovered",
    "relapsed": "came back",
    "aborted": "not recovered",
}

FINAL_STATES: tuple[State, ...] = ("recovered", "relapsed", "aborted")
"""After which nothing more becomes of an event."""


def what(event: SpikeEvent) -> str:
    """What was noticed: its step, its kind, and how far above the expected it was."""
    return f"step {event.step:,}: {KINDS[event.kind]}{_excess(event)}"


def answer(event: SpikeEvent) -> str:
    """What was done about it."""
    place = f" to step {event.rewound_to:,}" if event.rewound_to is not None else ""
    return _ACTIONS[event.action].replace("went back", f"went back{place}")


def outcome(event: SpikeEvent) -> str:
    """What became of it, and what it has cost."""
    if event.outcome is None:
        return _STATES["open"]
    state = _STATES[event.outcome.state]
    if event.outcome.state in FINAL_STATES:
        state += f" {'by' if event.outcome.state == 'aborted' else 'at'} step {event.outcome.at_step:,}"
    return f"{state}{cost(event)}"


def cost(event: SpikeEvent) -> str:
    """Steps and seconds that it has cost, after a semicolon; nothing if that is not known, or was nothing."""
    if event.outcome is None or not event.outcome.steps_lost:
        return ""
    seconds = event.outcome.seconds_lost
    took = f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.2g}"
    return f"; {counted(event.outcome.steps_lost, 'step')} lost in {took} s"


def short_outcome(event: SpikeEvent) -> str:
    """What became of it, in one word."""
    return "open" if event.outcome is None else event.outcome.state


def spikes_in_words(events: Iterable[SpikeEvent]) -> str | None:
    """A sentence on the spikes of a run and what they have cost; None if there were none."""
    spikes = [event for event in events if event.is_training]
    if not spikes:
        return None
    kinds = Counter(event.kind for event in spikes)
    names = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    lost = steps_lost(spikes)
    return f"{counted(len(spikes), 'spike')} ({names}), {counted(lost, 'step') if lost else 'no steps'} lost."


def counted(number: int, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _excess(event: SpikeEvent) -> str:
    parts = []
    if event.value is not None:
        against = f" where {event.baseline:.4g} was to be expected" if event.baseline is not None else ""
        parts.append(f"{event.value:.4g}{against}")
    if event.score is not None:
        parts.append(f"score {event.score:.1f}")
    return f", {', '.join(parts)}" if parts else ""
