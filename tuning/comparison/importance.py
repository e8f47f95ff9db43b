"""How much of the outcome each key decides: a random forest, asked about configurations that it has not seen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tuning.comparison.comparing import Comparison
from tuning.comparison.keys import is_numeric
from tuning.comparison.runs import ComparedRun

_LEAST_CONFIGURATIONS = 10
_FOLDS = 5
_REPEATS = 10
_TREES = 100
# Below, it foretells next to nothing.
_LEAST_EXPLAINED = 0.1
_DECADE = 10.0

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Importance:
    """What a key is worth to the forest."""

    key: str
    mean: float
    """Squared error that is added when the key's values are shuffled, in variances of the loss."""
    spread: float
    """Standard deviation over the parts that were left out in turn."""


@dataclass(frozen=True)
class Importances:
    """Those of all keys."""

    words: str
    """What they are and how far they can be trusted; or why there are none."""
    keys: tuple[Importance, ...] = ()
    """The greatest first; empty if one cannot tell."""


def importances(comparison: Comparison) -> Importances:
    """By permutation (Breiman, Machine Learning 45, 2001), on configurations that the forest was not fitted to.

    The outcome is the validation loss; a diverged run counts `Comparison.last_loss`. Runs that were cut short are left
    out. One column a key: numbers by their logarithm if they span a decade, words by a number each, which trees can
    take apart again.
    """
    runs = [run for run in comparison.runs if run.state == "diverged" or comparison.loss(run) is not None]
    groups = np.array([comparison.number_of[run.info.id] for run in runs])
    configurations = len(set(groups.tolist()))
    if len(comparison.keys) < 2:
        return Importances("Nothing to tell: it takes two keys that vary.")
    if configurations < _LEAST_CONFIGURATIONS:
        return Importances(
            f"Too few to tell: {configurations} configurations have an outcome, and it takes {_LEAST_CONFIGURATIONS}."
        )
    outcomes = np.array([_outcome(comparison, run) for run in runs])
    if outcomes.std() == 0:
        return Importances("All runs have the same outcome.")
    columns = np.column_stack([_column(key, runs) for key in comparison.keys])
    explained, losses_KF = _permuted(columns, outcomes, groups)
    if explained < _LEAST_EXPLAINED:
        return Importances(
            f"Cannot tell: a forest fitted to these runs foretells {max(0.0, explained):.0%} of the variance of the "
            "loss of configurations that it has not seen."
        )
    found = [
        Importance(key, float(np.mean(losses_F)), float(np.std(losses_F)))
        for key, losses_F in zip(comparison.keys, losses_KF, strict=True)
    ]
    words = (
        f"A random forest on {len(runs)} runs of {configurations} configurations foretells {explained:.0%} of the "
        "variance of the validation loss of configurations that it has not seen; a bar is how much worse it gets when "
        "the key is shuffled, its whisker the standard deviation over five parts left out in turn. "
        + ("Diverged runs count as the worst loss." if comparison.diverged else "")
    )
    return Importances(words.strip(), tuple(sorted(found, key=lambda each: -each.mean)))


def _outcome(comparison: Comparison, run: ComparedRun) -> float:
    loss = comparison.loss(run)
    return comparison.last_loss if loss is None else loss


def _column(key: str, runs: Sequence[ComparedRun]) -> Floats:
    settings = [run.settings for run in runs]
    if not is_numeric(key, settings):
        names = {value: number for number, value in enumerate(dict.fromkeys(each.get(key) for each in settings))}
        return np.array([names[each.get(key)] for each in settings], dtype=np.float64)
    values = [float(each[key] or 0) if key in each else math.nan for each in settings]
    known = [value for value in values if not math.isnan(value)]
    if min(known) > 0 and max(known) >= _DECADE * min(known):
        values, known = [math.log10(value) for value in values], [math.log10(value) for value in known]
    # Those that do not have the key stand apart.
    apart = min(known) - (max(known) - min(known))
    return np.array([apart if math.isnan(value) else value for value in values])


def _permuted(columns: Floats, outcomes: Floats, groups: npt.NDArray[np.int64]) -> tuple[float, list[list[float]]]:
    """The share of the variance that is foretold, and by key and fold how much less when its column is shuffled."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.model_selection import GroupKFold

    random = np.random.default_rng(0)
    variance = float(outcomes.var())
    errors: list[float] = []
    losses_KF: list[list[float]] = [[] for _ in range(columns.shape[1])]
    for fitted, left_out in GroupKFold(_FOLDS, shuffle=True, random_state=0).split(columns, outcomes, groups):
        forest = RandomForestRegressor(_TREES, random_state=0, min_samples_leaf=2)
        forest.fit(columns[fitted], outcomes[fitted])
        seen, truth = columns[left_out], outcomes[left_out]
        # All shuffled copies at once: a call takes longer than the rows.
        copies = [seen]
        for column in range(columns.shape[1]):
            for _ in range(_REPEATS):
                copy = seen.copy()
                # Drawn from all runs: a part that was left out may have one value of the key alone.
                copy[:, column] = random.choice(columns[:, column], len(seen))
                copies.append(copy)
        squares = ((forest.predict(np.vstack(copies)).reshape(len(copies), -1) - truth) ** 2).mean(axis=1)
        errors += [float(squares[0])] * len(seen)
        for column, own in enumerate(squares[1:].reshape(-1, _REPEATS)):
            losses_KF[column].append(float(own.mean() - squares[0]) / variance)
    return 1 - float(np.mean(errors)) / variance, losses_KF
