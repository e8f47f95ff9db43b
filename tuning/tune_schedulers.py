"""Ray Tune's schedulers as sweeps use them: trials go by their names, and a sweep that is resumed knows its rungs."""

import random
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler

from tuning.space import Space, neighbour
from tuning.sweep_config import AshaSchedulerConfig, PbtSchedulerConfig
from tuning.sweep_journal import Exploit, Rung
from tuning.trial import JOB, RUNG_LOSS
from tuning.trial_rank import TrialJob
from tuning.tune_adapters import NAME, trial_name

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

_STEP = "step"


class Asha(ASHAScheduler):  # type: ignore[misc]
    """Asynchronous successive halving on the optimizer step."""

    def __init__(
        self,
        config: AshaSchedulerConfig,
        rungs: tuple[int, ...],
        known: Iterable[Rung],
        on_rung: Callable[[Rung], None],
    ) -> None:
        """
        Args:
            config: of the sweep.
            rungs: optimizer steps of the rungs, rising.
            known: what trials have shown there in earlier commands, in order.
            on_rung: told of every trial that comes to one.
        """
        super().__init__(
            time_attr=_STEP,
            metric=RUNG_LOSS,
            mode="min",
            # Tune counts rungs by a logarithm, which the exact step of the last could round away.
            max_t=rungs[-1] + 1,
            grace_period=rungs[0],
            reduction_factor=config.reduction,
        )
        self._on_rung = on_rung
        for rung in known:
            trial = SimpleNamespace(trial_id=rung.name)
            super().on_trial_add(None, trial)
            super().on_trial_result(None, trial, {_STEP: rung.step, RUNG_LOSS: rung.loss})

    def on_trial_add(self, tune_controller: "TuneController", trial: "Trial") -> None:
        """A trial, which may have been here in an earlier command: under its name, for Tune's ids are new each time."""
        super().on_trial_add(tune_controller, _by_name(trial))

    def on_trial_result(self, tune_controller: "TuneController", trial: "Trial", result: dict[str, Any]) -> str:
        """Whether it goes on."""
        if RUNG_LOSS not in result:
            return str(TrialScheduler.CONTINUE)
        action = str(super().on_trial_result(tune_controller, _by_name(trial), result))
        goes_on = action == TrialScheduler.CONTINUE
        self._on_rung(Rung(trial_name(trial), result[_STEP], result[RUNG_LOSS], goes_on))
        return action

    def on_trial_complete(self, tune_controller: "TuneController", trial: "Trial", result: dict[str, Any]) -> None:
        """It is over; what it has shown at its rungs stays."""

    def on_trial_remove(self, tune_controller: "TuneController", trial: "Trial") -> None:
        """The same."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves its schedulers, to restore from what is restored from the sweep's own record instead.
        return {}


def _by_name(trial: "Trial") -> SimpleNamespace:
    return SimpleNamespace(trial_id=trial_name(trial))


class Pbt(PopulationBasedTraining):  # type: ignore[misc]
    """Population based training on the optimizer step, all trials in step."""

    def __init__(
        self,
        config: PbtSchedulerConfig,
        space: Space,
        on_exploit: Callable[[Exploit], TrialJob],
        exploited: int,
        reached: int = 0,
    ) -> None:
        """
        Args:
            config: of the sweep.
            space: its space.
            on_exploit: told of every exploit; returns what the trial is from then on.
            exploited: how often there was one in earlier commands.
            reached: the step of the most advanced trial's state. All meet after it: Tune, which believes that they
                begin, would compare one that is far with one that is not, and then wait for a step that all are past.
        """
        super().__init__(
            time_attr=_STEP,
            metric=RUNG_LOSS,
            mode="min",
            perturbation_interval=config.interval_steps,
            # Never drawn from, for `_get_new_config` is the project's own; Tune wants some.
            hyperparam_mutations={NAME: [None]},
            quantile_fraction=config.quantile,
            resample_probability=config.resample_probability,
            log_config=False,
            require_attrs=False,
            synch=True,
        )
        self._config, self._space, self._on_exploit, self._exploits = config, space, on_exploit, exploited
        self._next_perturbation_sync = config.interval_steps * (1 + reached // config.interval_steps)

    def on_trial_add(self, tune_controller: "TuneController", trial: "Trial") -> None:
        """A trial of the population. Tune refuses searchers here, which would see values change; the sweep's does not
        look at them."""
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)

    def on_trial_result(self, tune_controller: "TuneController", trial: "Trial", result: dict[str, Any]) -> str:
        """Whether it waits for the others. Tune would have it wait for those that failed for good, too."""
        return str(super().on_trial_result(_Living(tune_controller), trial, result))

    def choose_trial_to_run(self, tune_controller: "TuneController") -> "Trial | None":
        """The next one to take its turn."""
        chosen = super().choose_trial_to_run(tune_controller)
        if chosen is not None:
            return chosen
        trials = tune_controller.get_trials()
        waiting = [trial for trial in trials if trial.status == "PAUSED"]
        if not waiting or any(trial.status in ("PENDING", "RUNNING") for trial in trials):
            return None
        # The last one on its way did not come to the meeting, having diverged: it is called off.
        met = max(self._trial_state[trial].last_train_time for trial in waiting)
        self._next_perturbation_sync = met + self._config.interval_steps
        return super().choose_trial_to_run(tune_controller)

    def _get_new_config(self, trial: "Trial", trial_to_clone: "Trial") -> tuple[dict[str, Any], dict[str, Any]]:
        """Values near the donor's, within the space (Tune's own would leave it), for a trial that stays who it is."""
        source = random.Random(f"exploit {self._config.seed} {self._exploits}")
        self._exploits += 1
        near = trial_to_clone.config[JOB]["values"]
        values = neighbour(self._space, near, source, self._config.resample_probability)
        job = self._on_exploit(
            Exploit(trial_name(trial), trial_name(trial_to_clone), self._trial_state[trial].last_train_time, values)
        )
        return {NAME: trial_name(trial), JOB: job}, {}

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Living:
    """Tune's controller, without trials that are over among those that live: it keeps those that failed."""

    def __init__(self, controller: "TuneController") -> None:
        self._controller = controller

    def get_live_trials(self) -> "list[Trial]":
        """Those that may still come to a meeting."""
        return [trial for trial in self._controller.get_live_trials() if not trial.is_finished()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)
