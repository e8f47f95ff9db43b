"""What configurations are worth, and their order, by hand."""

from typing import Any

import pytest

from tuning.objective import Configuration, configurations, figures, ranked
from tuning.suggest import Verdict
from tuning.sweep_config import ObjectiveConfig
from tuning.sweep_journal import Begun, Ended, Exploit, TrialOutcome, TrialState

PLAIN = ObjectiveConfig()
FEW_DEAD = ObjectiveConfig.model_validate({"constraints": {"dead_experts": 2.0, "clip_rate": 0.5}})


def trial(
    number: int, loss: float | None, outcome: TrialOutcome | None = "finished", step: int = 100, seed: int = 0, **m: Any
) -> TrialState:
    begun = Begun(f"{number}-{seed}", number, seed, {"x": number}, "search", "/r")
    measures = {**({} if loss is None else {"val_loss": loss}), **m}
    return TrialState(begun, ended=Ended(begun.name, outcome, step, 1.0, measures) if outcome else None)


def configuration(*trials: TrialState) -> Configuration:
    return Configuration(trials[0].begun.number, trials[0].values, trials)


def test_a_configuration_is_there_once_all_of_its_trials_are_over() -> None:
    trials = [trial(1, 2.0), trial(0, 3.0, seed=4), trial(0, 4.0, seed=3), trial(2, 1.0), trial(2, None, None, seed=1)]
    found = configurations(trials)
    assert [(one.number, one.seeds) for one in found] == [(0, [3, 4]), (1, [0])]
    assert found[0].mean("val_loss") == 3.5


def test_a_mean_takes_every_seed() -> None:
    one = configuration(trial(0, 2.0, dead_experts=4.0), trial(0, 4.0, seed=1))
    assert (one.mean("val_loss"), one.mean("dead_experts"), one.mean("steps")) == (3.0, None, None)


@pytest.mark.parametrize(
    ("outcomes", "worst"),
    [
        (["finished", "finished"], "finished"),
        (["pruned", "finished"], "pruned"),
        (["diverged", "pruned"], "diverged"),
        (["finished", "failed", "diverged"], "failed"),
    ],
)
def test_a_configuration_is_what_the_worst_of_its_seeds_is(outcomes: list[TrialOutcome], worst: str) -> None:
    one = configuration(*(trial(0, 2.0, outcome, seed=seed) for seed, outcome in enumerate(outcomes)))
    assert one.outcome == worst
    assert one.is_feasible(PLAIN) == (worst == "finished")


def test_a_constraint_is_of_the_mean_over_seeds() -> None:
    kept = configuration(trial(0, 2.0, dead_experts=1.0), trial(0, 2.0, seed=1, dead_experts=3.0))
    assert kept.violations(FEW_DEAD) == {"dead_experts": 0.0}
    assert kept.is_feasible(FEW_DEAD)
    broken = configuration(trial(0, 2.0, dead_experts=2.5, clip_rate=0.1))
    assert broken.violations(FEW_DEAD) == pytest.approx({"dead_experts": 0.5, "clip_rate": -0.4})
    assert not broken.is_feasible(FEW_DEAD)


def test_the_order_is_that_by_hand() -> None:
    best_first = [
        trial(7, 3.1, dead_experts=2.0),  # keeps the constraint, if only just
        trial(3, 3.2, dead_experts=0.0),
        trial(9, 3.2, dead_experts=1.0),  # a tie, by number
        trial(1, 2.9, dead_experts=2.5),  # over it by a little, whatever its loss
        trial(0, 2.0, dead_experts=8.0),
        trial(8, 3.9, "pruned", 64),
        trial(6, 4.0, "pruned", 64),
        trial(2, 3.0, "pruned", 16),
        trial(5, 5.5, "diverged", 80, dead_experts=9.0),  # came farthest
        trial(4, 5.5, "diverged", 3, dead_experts=0.0),
        trial(10, None, "failed", 0),
    ]
    shuffled = sorted(best_first, key=lambda one: (one.begun.number * 7) % 11)
    order = ranked(configurations(shuffled), FEW_DEAD)
    assert [one.number for one in order] == [one.begun.number for one in best_first]


def test_what_has_all_seeds_of_the_final_comes_before_a_lower_loss_with_fewer() -> None:
    one, broken = configuration(trial(0, 1.0)), configuration(trial(3, 0.5, dead_experts=9.0))
    pairs = [configuration(trial(n, 2.0 + n), trial(n, 2.0 + n, seed=1)) for n in (1, 2)]
    lost = configuration(trial(4, 1.0), trial(4, 5.5, "diverged", 9, seed=1))
    assert ranked([one, lost, *pairs, broken], FEW_DEAD, 2) == [*pairs, one, broken, lost]
    assert ranked([one, lost, *pairs, broken], FEW_DEAD) == [one, *pairs, broken, lost]
    # Where nothing has them all, none is put back.
    assert ranked([one, *pairs], FEW_DEAD, 3) == [one, *pairs]


def test_a_verdict_has_the_mean_losses_and_by_how_much_constraints_are_exceeded() -> None:
    objective = ObjectiveConfig.model_validate({"constraints": {"dead_experts": 2.0}, "further": ["max_vio_late"]})
    one = configuration(
        trial(0, 2.0, dead_experts=3.0, max_vio_late=0.2), trial(0, 3.0, seed=1, dead_experts=5.0, max_vio_late=0.4)
    )
    verdict = one.verdict(objective)
    assert verdict is not None
    assert verdict.objectives == pytest.approx((2.5, 0.3))
    assert (verdict.violations, verdict.pruned_at) == ((0.0, 2.0), None)
    # One seed that diverged is a constraint that is broken.
    half = configuration(trial(0, 2.0), trial(0, 5.5, "diverged", 9, seed=1)).verdict(PLAIN)
    assert half == Verdict((3.75,), (1.0,), None)
    assert configuration(trial(0, 4.0, "pruned", 16), trial(0, 4.0, "pruned", 64, seed=1)).verdict(PLAIN) == Verdict(
        (4.0,), (0.0,), 64
    )


def test_what_failed_for_reasons_of_the_machine_is_not_held_against_its_values() -> None:
    assert configuration(trial(0, 2.0), trial(0, None, "failed", 0, seed=1)).verdict(PLAIN) is None


def test_with_population_based_training_values_are_the_last_ones() -> None:
    known = trial(0, 2.0)
    moved = TrialState(known.begun, (), (Exploit("0-0", "1-0", 20, {"x": 5}),), known.ended)
    assert configurations([moved])[0].values == {"x": 5}


def test_figures_are_measures_under_the_names_of_the_views() -> None:
    found = figures({"val_loss": 2.0}, 7)
    assert found == {"sweep/objective": 2.0, "sweep/val_loss": 2.0, "sweep/steps": 7.0}
