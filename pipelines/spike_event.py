"""Spike events: what went wrong in a run, what was done about it, and what became of it. Imports no torch.

A file of JSON lines in the run's folder. An event is a line; what became of it is a later line, so that nothing is ever
rewritten. Detectors of training write through rank 0, those of operations wherever they are: driver, Ray Train's
controller, worker.
"""

import json
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.json_lines import append_json

_log = logging.getLogger(__name__)

Kind = Literal[
    "loss",
    "grad_norm",
    "max_vio",
    "non_finite",
    "replica_mismatch",
    "worker_death",
    "worker_error",
    "worker_stall",
    "checkpoint_damaged",
    "checkpoint_failed",
    "tracking_outage",
]
"""What was noticed: of training the first five, of operations the others."""

TRAINING_KINDS: tuple[Kind, ...] = ("loss", "grad_norm", "max_vio", "non_finite", "replica_mismatch")

Action = Literal[
    "record",
    "skip_step",
    "rewind",
    "rewind_skip_samples",
    "rewind_anticipate",
    "rewind_lower_lr",
    "abort",
    "restart_workers",
    "use_older_checkpoint",
    "go_on",
]
"""The answer. ``go_on``: training does not need what failed, and went on without it."""

State = Literal["open", "recovered", "relapsed", "aborted"]


class LayerState(BaseModel):
    """One MoE layer at the event; a figure that was not finite, or not measured, is null."""

    model_config = ConfigDict(frozen=True)

    layer: int
    """The number of its block."""
    max_vio: float | None = None
    """Of the step's load."""
    idle_experts: int | None = None
    """Experts that no token of the batch reached."""
    bias_abs_max: float | None = None
    router_logit_rms: float | None = None
    expert_max: float | None = None
    """Largest absolute activation of a routed expert."""
    expert_kurtosis: float | None = None
    residual_rms: float | None = None
    """Of the residual stream after the block."""
    attention_logit_max: float | None = None


class SpikeOutcome(BaseModel):
    """What became of an event."""

    model_config = ConfigDict(frozen=True)

    state: State
    """recovered: training went on without another event for a while. relapsed: another came before that. aborted: the
    run was ended for it. open: the run ended, or goes on, before anything can be said."""
    at_step: int
    """Optimizer steps done when this was known."""
    steps_lost: int = 0
    """Steps whose update was refused, and steps that were taken back."""
    seconds_lost: float = 0.0
    """What those took."""


class SpikeEvent(BaseModel):
    """One event."""

    model_config = ConfigDict(frozen=True)

    id: str
    """Unique in the run, and told from kind, step and timeline: ``loss-000123`` or, after two rewinds,
    ``loss-000123-t2``."""
    kind: Kind
    step: int
    """The optimizer step, counted from 1, that it was noticed at; of operations the last one that was done."""
    timeline: int = 0
    """How often the run had gone back when it happened."""
    time_ms: int = Field(default_factory=lambda: time.time_ns() // 1_000_000)
    tokens_seen: int | None = None
    """Tokens trained on before the step, by the schedule."""
    value: float | None = None
    """What the detector saw, in its unit; null for what was not finite."""
    baseline: float | None = None
    """What was to be expected."""
    score: float | None = None
    """Robust standard deviations above it."""
    threshold: float | None = None
    """The score from which on it is an event."""
    onset: int | None = None
    """The first step of the unbroken row of conspicuous ones that ends here."""
    samples: tuple[int, ...] = ()
    """Ids of the batch's samples."""
    documents: tuple[str, ...] = ()
    """Names of the documents that the batch has text of."""
    layers: tuple[LayerState, ...] = ()
    """The MoE layers, in order."""
    grad_norms: dict[str, float | None] = Field(default_factory=dict)
    """Gradient norm of each group of parameters, before clipping; null if it was not finite."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """All finite figures of the step."""
    action: Action
    detail: str = ""
    """In words what happened and what was done, one line."""
    rewound_to: int | None = None
    """Optimizer steps done in the state that training went back to."""
    checkpoint: str | None = None
    """Name of the checkpoint that was pinned for a replay of the event."""
    outcome: SpikeOutcome | None = None

    @property
    def is_training(self) -> bool:
        """Whether it is one of training rather than of operations."""
        return self.kind in TRAINING_KINDS


def event_id(kind: Kind, step: int, timeline: int) -> str:
    """The id of an event of training."""
    return f"{kind}-{step:06}" + (f"-t{timeline}" if timeline else "")


def add_event(path: Path, event: SpikeEvent) -> None:
    """Append an event with one write call. What cannot be written is logged: records never stop training."""
    # The time is a default as well, and another one for whoever reads.
    _append(path, {"event": event.model_dump(mode="json", exclude_defaults=True) | {"time_ms": event.time_ms}})


def add_outcome(path: Path, event: str, outcome: SpikeOutcome) -> None:
    """Append what became of the event with this id."""
    _append(path, {"of": event, "outcome": outcome.model_dump(mode="json")})


def read_events(path: Path) -> list[SpikeEvent]:
    """All events of a run with the last that is known of each, in the order in which they were noticed.

    A line that a full disk cut short is left out. An event that was written twice, by a worker that was killed before
    it had noted that, counts once.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    events: dict[str, SpikeEvent] = {}
    for line in lines:
        try:
            content = json.loads(line)
            if "event" in content:
                event = SpikeEvent.model_validate(content["event"])
                events.setdefault(event.id, event)
            elif content["of"] in events:
                outcome = SpikeOutcome.model_validate(content["outcome"])
                events[content["of"]] = events[content["of"]].model_copy(update={"outcome": outcome})
        except (ValueError, KeyError, TypeError, ValidationError):
            continue
    return list(events.values())


def finite(value: float | None) -> float | None:
    """The value, or None where it is NaN or infinite."""
    return value if value is not None and math.isfinite(value) else None


def steps_lost(events: Iterable[SpikeEvent]) -> int:
    """Steps that all events have cost."""
    return sum(event.outcome.steps_lost for event in events if event.outcome is not None)


def _append(path: Path, content: dict[str, Any]) -> None:
    try:
        append_json(path, content)
    except OSError as error:
        _log.warning("an event is not recorded (%s): %s", error, content)
