"""Spike events as a run's detectors would write them down, for the tests of what becomes of the records."""

from typing import Any

from pipelines.run_folder import RunFolder
from pipelines.spike_event import LayerState, SpikeEvent, SpikeOutcome, State, add_event, add_outcome, event_id

BEGAN_MS = 1_790_000_000_000


def spike(step: int, **changes: Any) -> SpikeEvent:
    """A loss spike that training went back for, with all that is recorded of one."""
    fields = {
        "id": event_id("loss", step, 0),
        "kind": "loss",
        "step": step,
        "time_ms": BEGAN_MS + 1000 * step,
        "tokens_seen": 4096 * (step - 1),
        "value": 9.125,
        "baseline": 3.25,
        "score": 41.0,
        "threshold": 12.0,
        "onset": step - 1,
        "samples": (5, 0),
        "documents": ("a/000.txt", "b/c/001.txt"),
        "layers": (
            LayerState(layer=1, max_vio=0.5, idle_experts=2, bias_abs_max=0.01, expert_max=120.0, residual_rms=3.5),
            LayerState(layer=2, max_vio=0.25, idle_experts=0, bias_abs_max=0.02, router_logit_rms=1.5),
        ),
        "grad_norms": {"dense": 2.5, "experts": 40.0, "router": None},
        "metrics": {"train/loss": 9.125},
        "action": "rewind_skip_samples",
        "detail": f"step {step}: loss 9.125 is 41.0 robust standard deviations above the 3.25 that was to be expected",
        "rewound_to": step - 6,
        **changes,
    }
    return SpikeEvent.model_validate(fields)


def outcome(state: State, at_step: int, steps_lost: int = 6, seconds_lost: float = 2.5) -> SpikeOutcome:
    return SpikeOutcome(state=state, at_step=at_step, steps_lost=steps_lost, seconds_lost=seconds_lost)


def record(folder: RunFolder, event: SpikeEvent, became: SpikeOutcome | None = None) -> None:
    """Write an event into a run's file, and what became of it."""
    add_event(folder.events, event)
    if became is not None:
        add_outcome(folder.events, event.id, became)
