"""What an arm takes from other arms' results: the control that differs from them in one thing alone."""

from collections.abc import Mapping

import numpy as np

from tuning.series import Series
from tuning.study_config import Arm, Tree


def matched(arm: Arm, series: Mapping[str, Series]) -> Tree:
    """The keys of a run's config that follow from the series of the arms that ``arm.needs``; empty if it needs none."""
    if arm.clip_rate_of is not None:
        return {"stability": {"clip": {"max_norm": matching_max_norm(series[arm.clip_rate_of])}}}
    if arm.as_long_as is not None:
        steps = matching_steps(series[arm.as_long_as.arm], series[arm.as_long_as.paced_by])
        return {"schedule": {"steps": steps}}
    return {}


def matching_steps(series: Series, pace: Series) -> int:
    """Optimizer steps at the pace of one run that take as long as the schedule of another: at least 1.

    Medians, so that neither the first steps of a process nor a busy machine count.
    """
    return max(1, round(series.steps * series.step_seconds / pace.step_seconds))


def matching_max_norm(series: Series) -> float:
    """The limit on the global gradient norm over which as many of this run's steps were as its clip has clipped.

    Norms are those before clipping. A run that clips at that limit follows another path, so that its own clip rate is
    near this one's, not equal to it. Without a clipped step the limit is the largest norm, which nothing exceeds.

    Raises:
        ValueError: the run did not clip, so there is no rate to match.
    """
    if "train/clipped" not in series.train:
        raise ValueError("the arm to match has no clip, so there is no clip rate")
    clipped = np.array(series.train["train/clipped"])
    norms = np.array(series.train["train/grad_norm"])
    clipped, norms = clipped[np.isfinite(clipped)], norms[np.isfinite(norms)]
    return float(np.quantile(norms, 1.0 - clipped.mean()))
