"""A `TrialSource` as Ray Tune wants to see it: a searcher, a callback and a stopper."""

import threading
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.search import Searcher

from pipelines.errors import first_line
from pipelines.outcome import Ending
from tuning.trial import JOB
from tuning.trials import TrialSource

if TYPE_CHECKING:
    from ray.tune.experiment import Trial


NAME = "name"
"""Key of a trial's config under which the source's name of it is."""


def trial_name(trial: "Trial") -> str:
    """The source's name of Tune's trial."""
    return str(trial.config[NAME])


class Search(Searcher):  # type: ignore[misc]
    """Asks the source whenever Tune has room for a trial."""

    def __init__(self, source: TrialSource) -> None:
        super().__init__()
        self._source = source

    def suggest(self, trial_id: str) -> Any:
        """The next trial's config, None to be asked again later, or that there are no more."""
        match self._source.next():
            case "end":
                return Searcher.FINISHED
            case "wait":
                return None
            case name, job:
                return {NAME: name, JOB: job}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing: `Reporter` hears of it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the source keeps its own record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as above."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its settings at the start, to restore from what is restored from the source instead.
        return {}


class Reporter(tune.Callback):  # type: ignore[misc]
    """Tells the source what became of its trials."""

    def __init__(self, source: TrialSource) -> None:
        self._source = source

    def on_trial_start(self, iteration: int, trials: list["Trial"], trial: "Trial", **info: Any) -> None:
        """A trial has its actors."""
        self._source.started(trial_name(trial))

    def on_trial_complete(self, iteration: int, trials: list["Trial"], trial: "Trial", **info: Any) -> None:
        """A trial has ended by itself, or Tune ended it because all were to stop."""
        result = trial.last_result
        if (outcome := result.get("outcome")) is not None:
            self._source.ended(trial_name(trial), Ending(outcome, result["step"], result["reason"]))

    def on_trial_result(
        self, iteration: int, trials: list["Trial"], trial: "Trial", result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has come so far."""
        self._source.advanced(trial_name(trial), result["step"])

    def on_trial_error(self, iteration: int, trials: list["Trial"], trial: "Trial", **info: Any) -> None:
        """A trial failed more often than it may be restarted."""
        error = trial.get_error()
        self._source.failed(trial_name(trial), first_line(error) if error else "its actors died")

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Stop(tune.Stopper):  # type: ignore[misc]
    """Ends everything when an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether to end this trial."""
        return self._event.is_set()

    def stop_all(self) -> bool:
        """Whether to end all trials."""
        return self._event.is_set()

    def __getstate__(self) -> dict[str, Any]:
        return {}
