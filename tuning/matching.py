"""The fixed limit that clips as often as an adaptive one did: the control of every claim about adaptive clipping."""

import numpy as np

from tuning.series import Series


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
