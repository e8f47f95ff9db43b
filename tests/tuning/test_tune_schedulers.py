"""Tune's schedulers as sweeps use them, against plain ones, and begun again in the middle."""

import math
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from tests.tuning.sweep_file import RATES, SWEEP
from tuning.sweep_config import AshaSchedulerConfig, PbtSchedulerConfig, SweepConfig
from tuning.sweep_journal import Exploit, Rung, SweepJournal
from tuning.trial import JOB, RUNG_LOSS
from tuning.trial_rank import TrialJob
from tuning.tune_adapters import NAME
from tuning.tune_schedulers import Asha, Pbt

Result = tuple[str, int, float]


class Plain:
    """Asynchronous successive halving as its paper has it, top ``1 / reduction`` by quantile of those before it."""

    def __init__(self, reduction: int) -> None:
        self._share, self._seen = 1 / reduction, defaultdict[int, dict[str, float]](dict)

    def goes_on(self, name: str, step: int, loss: float) -> bool:
        before = self._seen[step]
        if name in before:
            return True
        limit = self._quantile(sorted(before.values())) if before else math.inf
        before[name] = loss
        return loss <= limit

    def _quantile(self, ordered: list[float]) -> float:
        place = self._share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])


class Scene:
    """A scheduler and Tune's trials, whose ids are others whenever the command is begun again."""

    def __init__(self, rungs: tuple[int, ...], reduction: int, known: Iterable[Rung] = ()) -> None:
        self.told: list[Rung] = []
        config = AshaSchedulerConfig(reduction=reduction)
        self.asha = Asha(config, rungs, known, self.told.append)
        self._trials: dict[str, Any] = {}

    def goes_on(self, name: str, step: int, loss: float) -> bool:
        if name not in self._trials:
            trial = SimpleNamespace(config={NAME: name}, trial_id=f"{random.getrandbits(32):08x}")
            self._trials[name] = trial
            self.asha.on_trial_add(None, trial)
        trial = self._trials[name]
        assert self.asha.on_trial_result(None, trial, {"step": step - 1}) == TrialScheduler.CONTINUE
        result = {"step": step, RUNG_LOSS: loss}
        goes_on = bool(self.asha.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE)
        if not goes_on:
            self.asha.on_trial_complete(None, trial, result)
        return goes_on


def stream(rungs: tuple[int, ...], seed: int, trials: int = 60, side_by_side: int = 4) -> Iterable[Result]:
    """What trials show, as a plain scheduler lets them go on; each rung of a trial, in an order of chance."""
    source, plain = random.Random(seed), Plain(3)
    waiting = [f"t{number}" for number in range(trials)]
    running: dict[str, int] = {}
    while waiting or running:
        while waiting and len(running) < side_by_side:
            running[waiting.pop(0)] = 0
        name = source.choice(sorted(running))
        step, loss = rungs[running[name]], source.uniform(2, 4)
        yield name, step, loss
        running[name] += 1
        if not plain.goes_on(name, step, loss) or running[name] == len(rungs):
            del running[name]


@pytest.mark.parametrize("rungs", [(10,), (10, 30, 90), (1, 3, 9, 27, 81), (1000, 3000, 9000, 27_000)])
def test_decisions_are_those_of_plain_asynchronous_successive_halving(rungs: tuple[int, ...]) -> None:
    scene, plain, stopped = Scene(rungs, 3), Plain(3), 0
    for name, step, loss in stream(rungs, 0):
        expected = plain.goes_on(name, step, loss)
        assert scene.goes_on(name, step, loss) == expected
        assert scene.told[-1] == Rung(name, step, loss, expected)
        stopped += not expected
    assert 0.5 * 60 < stopped < 60
    assert {rung.step for rung in scene.told} == set(rungs)


@pytest.mark.parametrize("cut", [1, 17, 50])
def test_begun_again_it_decides_as_one_that_never_stopped(tmp_path: Path, cut: int) -> None:
    rungs = (10, 30, 90)
    results = list(stream(rungs, 1))
    whole = Scene(rungs, 3)
    expected = [whole.goes_on(*result) for result in results]
    journal = SweepJournal(tmp_path / "trials.jsonl")
    for rung in whole.told[:cut]:
        journal.trials[rung.name] = journal.trials.get(rung.name) or _state(rung.name)
        journal.add(rung)
    again = Scene(rungs, 3, journal.rungs)
    assert again.told == []
    assert [again.goes_on(*result) for result in results[cut:]] == expected[cut:]


def test_a_trial_that_passes_a_rung_twice_counts_once() -> None:
    def decisions(repeated: bool) -> list[bool]:
        scene = Scene((10, 30), 2)
        assert scene.goes_on("a", 10, 3.0)
        if repeated:
            # Its worker died, and it repeats its steps from an earlier checkpoint: it is let through as before.
            assert all(scene.goes_on("a", 10, loss) for loss in (3.0, 9.0, 9.0))
        return [scene.goes_on(name, 10, loss) for name, loss in (("b", 3.5), ("c", 2.9), ("d", 3.1), ("e", 2.0))]

    assert decisions(repeated=True) == decisions(repeated=False) == [False, True, False, True]
    # Nor in a command that knows it from an earlier one, where it has another of Tune's ids.
    resumed = Scene((10, 30), 2, [Rung("a", 10, 3.0, goes_on=True)])
    assert resumed.goes_on("a", 10, 9.0)
    assert [resumed.goes_on(name, 10, loss) for name, loss in (("b", 3.5), ("c", 2.9))] == [False, True]


def test_a_loss_that_stands_for_divergence_is_never_among_the_best() -> None:
    scene = Scene((10,), 3)
    assert scene.goes_on("first", 10, 1e3)  # there is nothing to compare it with
    # The limits are a third of the way up: 1000, 335, 3.67.
    assert [scene.goes_on(f"t{number}", 10, 3.0 + number) for number in range(3)] == [True, True, False]
    assert not scene.goes_on("late", 10, 1e3)


def _state(name: str) -> Any:
    from tuning.sweep_journal import Begun, TrialState

    return TrialState(Begun(name, 0, 0, {}, "search", "/r"))


def test_a_population_s_exploits_are_the_same_ones_after_a_resume() -> None:
    space = SweepConfig.model_validate(
        {**SWEEP, "space": RATES, "searcher": {"kind": "random"}, "budget": {"trials": 4}}
    ).space
    weak, strong = (
        Trial("none", stub=True, config={NAME: name, JOB: {"values": {"optimizer.lr": lr}}})
        for name, lr in (("weak", 1e-2), ("strong", 1e-3))
    )

    def exploits(before: int, count: int) -> list[Exploit]:
        found: list[Exploit] = []

        def on_exploit(exploit: Exploit) -> TrialJob:
            found.append(exploit)
            return TrialJob(config={}, run_folder="/runs/weak", shards="/shards", values=exploit.values)

        pbt = Pbt(PbtSchedulerConfig(interval_steps=20), space, on_exploit, before)
        for trial in (weak, strong):
            pbt.on_trial_add(None, trial)
        pbt._trial_state[weak].last_train_time = 40
        for number in range(count):
            config, _ = pbt._get_new_config(weak, strong)
            # It stays who it is, with values of its own.
            assert (config[NAME], config[JOB]["run_folder"]) == ("weak", "/runs/weak")
            assert config[JOB]["values"] == found[number].values
        return found

    whole = exploits(0, 12)
    assert exploits(0, 5) + exploits(5, 7) == whole
    assert {(exploit.name, exploit.donor, exploit.step) for exploit in whole} == {("weak", "strong", 40)}
    rates = [exploit.values["optimizer.lr"] for exploit in whole]
    near = [rate for rate in rates if rate in (0.0008, 0.0012)]
    assert {0.0008, 0.0012} == set(near)
    assert len(near) < len(rates)  # some are drawn anew
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
