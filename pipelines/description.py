"""What a run was and how it ended, in a plain sentence."""

from collections.abc import Sequence
from typing import Literal

from pipelines.config import RunConfig
from pipelines.history import History
from pipelines.spike_event import SpikeEvent
from pipelines.spike_words import spikes_in_words

Status = Literal["FINISHED", "FAILED", "KILLED"]

_UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
_VERBS = {"FINISHED": "Trained", "FAILED": "Failed while training", "KILLED": "Stopped while training"}


def describe(
    config: RunConfig,
    history: History,
    status: Status | None = None,
    reason: str | None = None,
    events: Sequence[SpikeEvent] = (),
) -> str:
    """One sentence on a run for people who see nothing else of it, and one on its spikes if it had any.

    Args:
        config: what it was to do.
        history: what it did.
        status: how it ended; None while it runs.
        reason: why it ended early, for those who look no further.
        events: what went wrong in it.
    """
    verb = _VERBS[status] if status else "Training"
    parallel = config.parallel
    workers = f"{parallel.workers} worker{'s' if parallel.workers > 1 else ''}"
    experts = f", EP {parallel.expert_parallel}" if parallel.expert_parallel > 1 else ""
    steps = config.steps
    sentence = f"{verb} a {model_in_words(config, history)} for {steps:,} steps on {workers}{experts}"
    if status in ("FAILED", "KILLED"):
        sentence += f", at step {history.last_step:,}"
        if reason:
            sentence += f" ({reason})"
    loss = history.last("val/loss")
    if status and loss is not None:
        sentence += f": val/loss {loss:.3f} nats per token"
        if (per_byte := history.last("val/nats_per_byte")) is not None:
            sentence += f", {per_byte:.3f} per byte"
    if status and history.diverged:
        sentence += "; the loss diverged"
    spikes = spikes_in_words(events)
    # Of its own, below: the UI's table shows the first line.
    return f"{sentence}." + (f"\n\n{spikes}" if spikes else "")


def count(number: float) -> str:
    """A large number in few characters: 950, 1.9 M, 671 B."""
    size, unit = next(((size, unit) for size, unit in _UNITS if number >= size), (1.0, ""))
    scaled = number / size
    return f"{scaled:.{1 if unit and scaled < 100 else 0}f} {unit}".rstrip()


def parameters(history: History) -> str | None:
    """Number of parameters, in all and active per token; None before the workers have counted them."""
    total, active = history.last("model/parameters"), history.last("model/active_parameters")
    if total is None:
        return None
    return f"{count(total)} parameters" + (f", {count(active)} active" if active not in (None, total) else "")


def model_in_words(config: RunConfig, history: History) -> str:
    """The model's shape and size, as far as it is known."""
    moe = config.model.moe
    details = [f"{moe.num_experts} experts, top-{moe.top_k}"] if moe.num_experts else []
    if counted := parameters(history):
        details.append(counted)
    name = f"{config.model.num_layers}-layer {'MoE' if moe.num_experts else 'dense model'}"
    return f"{name} ({', '.join(details)})" if details else name
