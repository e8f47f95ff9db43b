"""Who says which configuration comes next: a grid, chance, or Optuna with what is known so far.

A suggestion depends on what was told and on its number alone, so that a resumed sweep goes on as it would have.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tuning.space import Space, random_point, rounded, shuffled_grid
from tuning.space_config import (
    ChoiceDimension,
    Dimension,
    GridDimension,
    IntDimension,
    LogUniformDimension,
    UniformDimension,
    Values,
    in_order,
    is_active,
)
from tuning.sweep_config import GridSearcherConfig, RandomSearcherConfig, SweepConfig

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Verdict:
    """What became of a configuration, as a searcher wants to know it; all finite."""

    objectives: tuple[float, ...]
    """To be small: the validation loss, then the further ones."""
    violations: tuple[float, ...] = ()
    """By how much each constraint is exceeded; 0 or less keeps it."""
    pruned_at: int | None = None
    """The optimizer step at which the scheduler ended it, the loss being that of there; None if it was not ended."""


class Suggester(Protocol):
    """Hands out configurations by their numbers, which count from 0."""

    def suggest(self, number: int) -> Values | None:
        """The configuration of that number; None if the space is exhausted."""

    def begun(self, number: int, values: Values) -> None:
        """A configuration that was handed out by an earlier command is still to be told."""

    def tell(self, number: int, values: Values, verdict: Verdict) -> None:
        """What became of one."""


def make_suggester(sweep: SweepConfig) -> Suggester:
    """That of the sweep's config."""
    match sweep.searcher:
        case GridSearcherConfig(seed=seed):
            return _Grid(shuffled_grid(sweep.space, seed))
        case RandomSearcherConfig(seed=seed):
            return _Random(sweep.space, seed)
        case searcher:
            return _Optuna(
                sweep.space,
                searcher.seed,
                searcher.startup_trials,
                objectives=1 + len(sweep.objective.further),
            )


class _Unlearning:
    """Nothing that is told changes what comes next."""

    def begun(self, number: int, values: Values) -> None:
        """`Suggester.begun`."""

    def tell(self, number: int, values: Values, verdict: Verdict) -> None:
        """`Suggester.tell`."""


class _Grid(_Unlearning):
    def __init__(self, points: Sequence[Values]) -> None:
        self._points = points

    def suggest(self, number: int) -> Values | None:
        """`Suggester.suggest`."""
        return self._points[number] if number < len(self._points) else None


class _Random(_Unlearning):
    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed

    def suggest(self, number: int) -> Values | None:
        """`Suggester.suggest`."""
        return random_point(self._space, self._seed, number)


class _Optuna:
    """Optuna's estimator, for one objective or several. Configurations that still run count as bad ones, so that trials
    side by side are not alike. Its memory is made anew for each suggestion: a live one would depend on the order in
    which trials ended, and on when the command was begun again."""

    def __init__(self, space: Space, seed: int, startup: int, objectives: int) -> None:
        self._space, self._seed, self._startup, self._objectives = space, seed, startup, objectives
        self._open: dict[int, Values] = {}
        self._told: dict[int, tuple[Values, Verdict]] = {}

    def suggest(self, number: int) -> Values | None:
        """`Suggester.suggest`."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=1_000_003 * self._seed + number, n_startup_trials=self._startup)
        study = optuna.create_study(directions=["minimize"] * self._objectives, sampler=sampler)
        study.add_trials(self._known())
        trial, values = study.ask(), Values()
        for key in in_order(self._space):
            dimension = self._space[key]
            if is_active(dimension, values):
                values[key] = _suggested(trial, key, dimension)
        self._open[number] = values
        return values

    def begun(self, number: int, values: Values) -> None:
        """`Suggester.begun`."""
        self._open[number] = values

    def tell(self, number: int, values: Values, verdict: Verdict) -> None:
        """`Suggester.tell`."""
        self._open.pop(number, None)
        self._told[number] = values, verdict

    def _known(self) -> "Iterator[optuna.trial.FrozenTrial]":
        from optuna.trial import TrialState

        for _, (values, verdict) in sorted(self._told.items()):
            constraints = {str(number): by for number, by in enumerate(verdict.violations)}
            result: dict[str, Any]
            if verdict.pruned_at is None:
                result = {"values": verdict.objectives}
            elif self._objectives == 1:
                result = {"state": TrialState.PRUNED, "intermediate_values": {verdict.pruned_at: verdict.objectives[0]}}
            else:
                # Its other objectives are not known; it is among the worst in the first, where it was ended.
                result = {"state": TrialState.FAIL}
            yield self._frozen(values, constraints=constraints, **result)
        for _, values in sorted(self._open.items()):
            yield self._frozen(values, state=TrialState.RUNNING)

    def _frozen(self, point: Values, **result: Any) -> "optuna.trial.FrozenTrial":
        import optuna

        params = {key: _as_param(self._space[key], value) for key, value in point.items()}
        distributions = {key: _distribution(self._space[key]) for key in point}
        return optuna.trial.create_trial(params=params, distributions=distributions, **result)


def _distribution(dimension: Dimension) -> "optuna.distributions.BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match dimension:
        case ChoiceDimension(values=values) | GridDimension(values=values):
            # By their places: a value may be a whole section, which Optuna cannot hold.
            return CategoricalDistribution(range(len(values)))
        case UniformDimension(low=low, high=high):
            return FloatDistribution(low, high)
        case LogUniformDimension(low=low, high=high):
            return FloatDistribution(low, high, log=True)
        case IntDimension(low=low, high=high, log=log):
            return IntDistribution(low, high, log=log)


def _as_param(dimension: Dimension, value: Any) -> Any:
    return dimension.values.index(value) if isinstance(dimension, ChoiceDimension | GridDimension) else value


def _suggested(trial: "optuna.Trial", key: str, dimension: Dimension) -> Any:
    match dimension:
        case ChoiceDimension(values=values) | GridDimension(values=values):
            return values[trial.suggest_categorical(key, range(len(values)))]
        case UniformDimension(low=low, high=high):
            return rounded(trial.suggest_float(key, low, high), low, high)
        case LogUniformDimension(low=low, high=high):
            return rounded(trial.suggest_float(key, low, high, log=True), low, high)
        case IntDimension(low=low, high=high, log=log):
            return trial.suggest_int(key, low, high, log=log)
