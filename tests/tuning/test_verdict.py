import math
import re
from typing import Any

import pytest

from tuning.results import Results, TrialKey, TrialResult
from tuning.study_config import StudyConfig
from tuning.verdict import ClaimVerdict, judge

# Two-sided 95 % point of Student's t with 4 degrees of freedom, and half the length of the interval of five values
# that lie -0.02, -0.01, 0, 0.01 and 0.02 off their mean: their standard deviation is 0.01 * sqrt(2.5).
T4 = 2.776
REACH = T4 * 0.01 * math.sqrt(2.5 / 5)
STEPS = [-0.02, -0.01, 0.0, 0.01, 0.02]


def study(*conditions: dict[str, Any], exercised: tuple[dict[str, Any], ...] = (), **keys: Any) -> StudyConfig:
    claim = {"name": "first", "says": "so", "conditions": list(conditions), "exercised": list(exercised)}
    content = {
        "title": "a study",
        "question": "which?",
        "base": ["micro"],
        "arms": {"new": {"says": "new"}, "old": {"says": "old"}},
        "shown": ["val_loss"],
        "claims": [claim],
    }
    return StudyConfig.model_validate(content | keys)


def condition(relation: str = "below", measure: str = "val_loss", right: Any = None, **keys: Any) -> dict[str, Any]:
    return {
        "left": {"arm": "new", "measure": measure},
        "relation": relation,
        "right": {"arm": "old", "measure": measure} if right is None else right,
        **keys,
    }


def results(new: list[float], old: list[float], measure: str = "val_loss", **others: float) -> Results:
    trials = [
        TrialResult(TrialKey(seed, arm), {"val_loss": 1.0, "diverged": 0.0, measure: value, **others})
        for arm, values in (("new", new), ("old", old))
        for seed, value in enumerate(values)
    ]
    return Results(trials, ["new", "old"], [None])


def around(mean: float) -> list[float]:
    return [mean + step for step in STEPS]


def only(config: StudyConfig, found: Results) -> ClaimVerdict:
    [verdict] = judge(config, found)
    return verdict


@pytest.mark.parametrize(
    ("relation", "mean", "outcome"),
    [
        ("below", -REACH - 1e-4, "holds"),
        ("below", -REACH + 1e-4, "cannot tell"),
        ("below", 0.0, "cannot tell"),
        ("below", REACH - 1e-4, "cannot tell"),
        ("below", REACH + 1e-4, "does not hold"),
        ("above", REACH + 1e-4, "holds"),
        ("above", REACH - 1e-4, "cannot tell"),
        ("above", -REACH + 1e-4, "cannot tell"),
        ("above", -REACH - 1e-4, "does not hold"),
        ("at_most", -REACH - 1e-4, "holds"),
        ("at_most", -REACH + 1e-4, "cannot tell"),
        ("at_most", REACH - 1e-4, "cannot tell"),
        ("at_most", REACH + 1e-4, "does not hold"),
    ],
)
def test_a_difference_counts_beyond_the_noise_of_the_seeds(relation: str, mean: float, outcome: str) -> None:
    found = results(around(2.0 + mean), [2.0] * 5)
    verdict = only(study(condition(relation)), found)
    assert verdict.verdict == outcome
    [judged] = verdict.conditions
    assert judged.verdict == outcome
    assert judged.difference is not None
    assert judged.left == pytest.approx(2.0 + mean)
    assert judged.right == 2.0
    bounds = (judged.difference.mean, judged.difference.low, judged.difference.high)
    assert bounds == pytest.approx((mean, mean - REACH, mean + REACH), abs=1e-5)
    assert judged.difference.n == 5


@pytest.mark.parametrize(
    ("mean", "below", "above", "at_most"),
    [
        (-0.1, "holds", "does not hold", "holds"),
        (0.0, "does not hold", "does not hold", "holds"),
        (0.1, "does not hold", "holds", "does not hold"),
    ],
)
def test_without_any_spread_the_sign_decides(mean: float, below: str, above: str, at_most: str) -> None:
    found = results([mean] * 3, [0.0] * 3)
    assert only(study(condition("below")), found).verdict == below
    assert only(study(condition("above")), found).verdict == above
    assert only(study(condition("at_most")), found).verdict == at_most


def test_arms_are_compared_seed_by_seed() -> None:
    # The seeds differ a hundred times more than the arms do.
    old = [1.0, 2.0, 3.0, 4.0, 5.0]
    new = [value - 0.1 + step / 10 for value, step in zip(old, STEPS, strict=True)]
    assert only(study(condition()), results(new, old)).verdict == "holds"
    assert only(study(condition()), results(new[::-1], old)).verdict == "cannot tell"


def test_the_factor_is_one_of_the_right_side() -> None:
    found = results(around(0.9), around(2.0))
    assert only(study(condition(factor=0.5)), found).verdict == "holds"
    assert only(study(condition(factor=0.4)), found).verdict == "does not hold"


def test_the_right_side_can_be_a_number() -> None:
    found = results(around(0.9), around(7.0))
    [judged] = only(study(condition(right=2.0, factor=0.5)), found).conditions
    assert (judged.verdict, judged.right) == ("holds", 2.0)
    assert only(study(condition(right=0.8)), found).verdict == "does not hold"


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize(
    ("mean", "outcome"),
    [
        (0.0, "holds"),
        (0.10 - REACH - 1e-4, "holds"),
        (0.10 - REACH + 1e-4, "cannot tell"),
        (0.10 + REACH - 1e-4, "cannot tell"),
        (0.10 + REACH + 1e-4, "does not hold"),
    ],
)
def test_within_is_as_a_share_of_the_right_side(side: int, mean: float, outcome: str) -> None:
    # Shares of 4 = 0.5 * 8.
    found = results([4 * (1 + share) for share in around(side * mean)], [8.0] * 5)
    verdict = only(study(condition("within", factor=0.5, tolerance=0.10)), found)
    assert verdict.verdict == outcome
    [judged] = verdict.conditions
    assert judged.difference is not None
    assert judged.difference.mean == pytest.approx(side * mean)


def test_nothing_is_relative_to_zero_but_zero() -> None:
    config = study(condition("within", tolerance=0.1))
    assert only(config, results([0.0, 0.0], [0.0, 0.0])).verdict == "holds"
    verdict = only(config, results([0.0, 1.0], [0.0, 0.0]))
    assert verdict.verdict == "cannot tell"
    assert "no relative difference from 0" in verdict.conditions[0].sentence


@pytest.mark.parametrize(
    ("measures", "outcome"),
    [
        ((-1.0, -1.0), "holds"),
        ((-1.0, 0.0), "cannot tell"),
        ((0.0, 1.0), "does not hold"),
        ((1.0, -1.0), "does not hold"),
    ],
)
def test_a_claim_needs_all_of_its_conditions(measures: tuple[float, float], outcome: str) -> None:
    trials = []
    for seed, step in enumerate(STEPS):
        for arm, share in (("new", 1.0), ("old", 0.0)):
            first, second = (share * (mean + step) for mean in measures)
            trials.append(TrialResult(TrialKey(seed, arm), {"val_loss": first, "loss_spikes": second, "diverged": 0.0}))
    config = study(condition(), condition(measure="loss_spikes"))
    verdict = only(config, Results(trials, ["new", "old"], [None]))
    assert verdict.verdict == outcome
    assert len(verdict.conditions) == 2


@pytest.mark.parametrize(("clip_rate", "outcome"), [(0.3, "holds"), (0.2, "not exercised"), (0.1, "not exercised")])
def test_a_mechanism_that_did_not_act_proves_nothing(clip_rate: float, outcome: str) -> None:
    needs = {"quantity": {"arm": "new", "measure": "clip_rate"}, "above": 0.2}
    found = results(around(1.0), around(2.0), clip_rate=clip_rate)
    verdict = only(study(condition(), exercised=(needs,)), found)
    assert verdict.verdict == outcome
    assert verdict.conditions[0].verdict == "holds"
    if outcome == "not exercised":
        assert verdict.reason == f"clip_rate of new is {clip_rate:g}, and should be above 0.2"
    else:
        assert verdict.reason == ""


def test_one_block_is_no_verdict() -> None:
    verdict = only(study(condition()), results([1.0], [2.0]))
    assert verdict.verdict == "cannot tell"
    assert verdict.reason == "there is one whole block, and it takes 2"
    assert verdict.conditions[0].sentence == "val_loss: new 1 against old 2: difference -1, 1 seed"


def test_no_block_is_no_verdict() -> None:
    verdict = only(study(condition()), results([1.0, 1.0], []))
    assert (verdict.verdict, verdict.conditions, verdict.reason) == ("cannot tell", (), "there is no whole block")


def test_a_seed_without_its_whole_block_is_left_out() -> None:
    [judged] = only(study(condition()), results([1.0, 1.1, 99.0], [2.0, 2.1])).conditions
    assert judged.left == pytest.approx(1.05)
    assert judged.difference is not None
    assert judged.difference.n == 2


def test_a_measure_that_the_runs_do_not_have_is_named_with_its_claim() -> None:
    found = results([1.0, 1.0], [2.0, 2.0])
    message = re.escape("claim 'first': clip_rate is not among the measures of new-s0")
    with pytest.raises(ValueError, match=message):
        judge(study(condition(measure="clip_rate")), found)
    needs = {"quantity": {"arm": "new", "measure": "clip_rate"}}
    with pytest.raises(ValueError, match=message):
        judge(study(condition(), exercised=(needs,)), found)


def test_what_a_run_diverged_before_cannot_be_told() -> None:
    trials = [
        TrialResult(TrialKey(seed, arm), {"val_loss": 1.0 + (arm == "old"), "diverged": float(arm == "old")})
        for seed in range(3)
        for arm in ("new", "old")
    ]
    found = Results(trials, ["new", "old"], [None])
    condition_on_it = {
        "left": {"arm": "new", "measure": "val_loss"},
        "relation": "below",
        "right": {"arm": "old", "measure": "dead_experts"},
    }
    verdict = only(study(condition_on_it), found)
    assert verdict.verdict == "cannot tell"
    assert verdict.conditions[0].sentence == "old-s0 diverged before dead_experts was measured"
    needs = {"quantity": {"arm": "old", "measure": "dead_experts"}}
    verdict = only(study(condition(), exercised=(needs,)), found)
    assert verdict.verdict == "cannot tell"
    assert verdict.reason == "old-s0 diverged before dead_experts was measured"


def test_the_sentence_has_the_figures_in_plain_words() -> None:
    found = results([0.0431, 0.0429], [0.2104, 0.2096], measure="max_vio_global")
    [judged] = only(study(condition(measure="max_vio_global", factor=0.33)), found).conditions
    assert judged.sentence == (
        "max_vio_global: new 0.043 against 0.33 * old 0.21: difference -0.0263 [-0.0267, -0.0259], 2 seeds"
    )
    [judged] = only(study(condition("within", "max_vio_global", tolerance=0.05)), found).conditions
    assert judged.sentence == (
        "max_vio_global: new 0.043 against old 0.21: relative difference -79.5 % [-79.6 %, -79.4 %], 2 seeds, "
        "asked for 5 %"
    )


def test_claims_are_judged_on_the_grid_as_they_say() -> None:
    at_best = {"kind": "best"}
    stable = {"kind": "largest_stable"}
    config = study(
        {
            "left": {"arm": "new", "measure": "val_loss", "over": at_best},
            "relation": "below",
            "right": {"arm": "old", "measure": "val_loss", "over": at_best},
        },
        {
            "left": {"arm": "old", "measure": "diverged", "over": stable},
            "relation": "below",
            "right": {"arm": "new", "measure": "diverged", "over": stable},
        },
        grid={"key": "optimizer.lr", "values": [0.001, 0.01]},
    )
    losses = {("new", 0.001): 2.0, ("new", 0.01): 1.0, ("old", 0.001): 1.5, ("old", 0.01): 5.5}
    trials = [
        TrialResult(TrialKey(seed, arm, point), {"val_loss": loss, "diverged": float(loss > 5)})
        for (arm, point), loss in losses.items()
        for seed in range(3)
    ]
    verdict = only(config, Results(trials, ["new", "old"], [0.001, 0.01]))
    assert verdict.verdict == "holds"
    assert [judged.sentence for judged in verdict.conditions] == [
        "val_loss: new at its best point 1 against old at its best point 1.5: difference -0.5 [-0.5, -0.5], 3 seeds",
        "diverged: old (largest point without divergence) 0.001 against new (largest point without divergence) 0.01: "
        "difference -0.009 [-0.009, -0.009], 3 seeds",
    ]
