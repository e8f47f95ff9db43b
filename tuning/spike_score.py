"""The spike score: which share of a run's values stand out above their course."""

import math
import statistics
from collections import deque
from collections.abc import Sequence, Set

import numpy as np

_DEVIATIONS = 7.0
_LONG_RUN, _LONG_WINDOW, _SHORT_WINDOW = 5000, 1000, 200
_LEAST = 50
_LEVEL = 9
# What rounding to 6 digits makes of a smooth course is no spike.
_ROUNDING = 1e-6


def first_scored_step(warmup_steps: int) -> int:
    """The first step, from 1, of which `spike_score` can say something if all values are finite and none excluded."""
    # The first value of all has none before it to be compared with.
    return max(warmup_steps, 1) + _LEAST + 1


def spike_score(
    values: Sequence[float], steps: int, warmup_steps: int = 0, excluded_steps: Set[int] = frozenset()
) -> float | None:
    """Percent of values at least 7 standard deviations above the mean of the last 200, after OLMo 2.

    Theirs (arXiv 2501.00656) is the share of values that far away from the rolling mean of the last 1000. That window
    is kept for runs of 5000 steps and more; ``steps`` is how many the schedule has. What else is different, and why:

    - A short run is mostly descent, and the fall within the window would widen its deviation until nothing stands out.
      So each value is taken less the median of the 9 before it. The median knows nothing of what follows, passes over
      up to 4 spikes in a row, and gives in to a jump that stays, of which 5 steps count.
    - Only what stands out above counts: a fall of the loss is no spike.
    - What stands out, either way, is kept out of the window, so that one spike does not hide the next.
    - The warm-up is left out of the window as well as of the score: gradient norms there can be a hundred times those
      that follow. The score begins when the window holds 50 values.

    ``values`` are those of step 1 and on. One that is not finite is a spike at any step. ``excluded_steps`` (from 1)
    have no part in anything. None if there was no value to score.
    """
    before: deque[float] = deque(maxlen=_LEVEL)
    window: deque[float] = deque(maxlen=_LONG_WINDOW if steps >= _LONG_RUN else _SHORT_WINDOW)
    scored = spikes = 0
    for step, value in enumerate(values, start=1):
        if step in excluded_steps:
            continue
        if not math.isfinite(value):
            scored, spikes = scored + 1, spikes + 1
            continue
        if step > warmup_steps and before:
            residual = value - statistics.median(before)
            stands_out = False
            if len(window) >= _LEAST:
                offset = float(residual - np.mean(window))
                limit = _DEVIATIONS * max(float(np.std(window)), _ROUNDING * abs(value))
                stands_out = abs(offset) >= limit > 0
                scored, spikes = scored + 1, spikes + int(stands_out and offset > 0)
            if not stands_out:
                window.append(residual)
        before.append(value)
    return 100.0 * spikes / scored if scored else None
