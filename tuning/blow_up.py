"""When a trial has diverged although its loss is finite: there is nothing left to learn from it."""

import math

# The loss before training is that of guessing, about ln(vocabulary): nothing that still trains stays far above it. A
# spike may pass it for some steps and come back.
_FACTOR = 1.25
_STEPS = 8


class BlowUp:
    """Looks at every step's training loss.

    A trial has blown up when 8 losses in a row are 1.25 times its first or more. One that ends above its first loss has
    diverged in any case (`tuning.measures`), so that this changes no verdict but of a run that would have come back.
    """

    def __init__(self, first: float | None = None) -> None:
        """``first``: the loss of its first step, where a trial goes on from a later one."""
        self._first = first
        self._above = 0

    def see(self, loss: float) -> str | None:
        """Take note of a step's loss, nats per token; why the trial has diverged, if it has."""
        if not math.isfinite(loss):
            return None  # the run's own answer to spikes sees to it
        if self._first is None:
            self._first = loss
        self._above = self._above + 1 if loss >= _FACTOR * self._first else 0
        if self._above < _STEPS:
            return None
        return (
            f"the loss was {_FACTOR:g} times the first ({self._first:.2f}) or more for {_STEPS} steps, now {loss:.4g}"
        )
