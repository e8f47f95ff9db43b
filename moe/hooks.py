"""Where what stands outside of a run's techniques reaches into its steps: responses to spikes, rehearsed faults."""

from collections.abc import Mapping
from dataclasses import dataclass

from moe.schedule import Moment
from moe.stability.detector import Reading


@dataclass(frozen=True)
class Seen:
    """What is known of a step before it is decided whether its update is taken; the same on every rank."""

    step: int
    """The optimizer step, counted from 1."""
    moment: Moment
    readings: tuple[Reading, ...]
    """What the spike detector makes of the loss, the gradient norm and MaxVio."""
    is_finite: bool
    """Whether both are finite; the update is never taken where they are not."""
    metrics: Mapping[str, float]
    differing: tuple[str, ...] = ()
    """Names of parameters whose copies on several ranks were not the same when the step began."""


class StepHook:
    """Base of all hooks: does nothing. The slots are listed in the order of the step; every rank calls them alike."""

    def before_step(self, moment: Moment) -> None:
        """Runs first of all."""

    def after_backward(self, moment: Moment) -> None:
        """Runs when this rank's gradients are complete, before they are summed over the ranks."""

    def takes(self, seen: Seen) -> bool:
        """Whether the update is taken: False on any hook refuses it. Must be the same on every rank."""
        return True

    def lr_factor(self, moment: Moment) -> float:
        """Factor on the learning rate of the step."""
        return 1.0
