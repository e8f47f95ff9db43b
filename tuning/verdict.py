"""Whether the claims of a study hold, judged seed by seed from what its trials have shown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tuning.quantities import Unmeasured, by_seed
from tuning.results import Results
from tuning.statistics import Interval, interval
from tuning.study_config import (
    AtBest,
    AtHighest,
    AtPoint,
    Claim,
    Condition,
    Exercised,
    Grid,
    LargestStable,
    Quantity,
    Sensitivity,
    StudyConfig,
)

Verdict = Literal["holds", "does not hold", "cannot tell", "not exercised"]

_LEAST_BLOCKS = 2


@dataclass(frozen=True)
class ConditionVerdict:
    """What came of one comparison."""

    verdict: Verdict
    sentence: str
    """The figures in one line, rounded."""
    left: float | None = None
    """Mean over seeds; None, as the other figures, where a run diverged before it was measured."""
    right: float | None = None
    """Mean over seeds, without the factor."""
    difference: Interval | None = None
    """Of ``left - factor * right``, paired by seed; for ``within`` as a share of ``factor * right``."""


@dataclass(frozen=True)
class ClaimVerdict:
    """What came of one claim."""

    claim: Claim
    verdict: Verdict
    conditions: tuple[ConditionVerdict, ...]
    """In the claim's order; judged in any case, so that a reader sees what came out."""
    reason: str = ""
    """Why nothing can be concluded, where that is not to be seen from the conditions."""


def judge(config: StudyConfig, results: Results) -> list[ClaimVerdict]:
    """A verdict for every claim of a study, in its order.

    A condition holds if it does beyond the noise of the seeds: the 95 % interval of the paired differences is all on
    its side. It does not hold if that interval is all on the other, and in between one cannot tell.

    Raises:
        ValueError: A claim names a measure that its runs do not have.
    """
    return [_judge_claim(claim, results, config.grid) for claim in config.claims]


def _judge_claim(claim: Claim, results: Results, grid: Grid | None) -> ClaimVerdict:
    blocks = len(results.seeds)
    if not blocks:
        return ClaimVerdict(claim, "cannot tell", (), "there is no whole block")
    try:
        conditions = tuple(_judge_condition(condition, results, grid) for condition in claim.conditions)
        idle = [reason for exercised in claim.exercised if (reason := _not_exercised(exercised, results, grid))]
    except Unmeasured as error:
        return ClaimVerdict(claim, "cannot tell", conditions, str(error))
    except ValueError as error:
        raise ValueError(f"claim {claim.name!r}: {error}") from error
    if blocks < _LEAST_BLOCKS:
        reason = f"there is one whole block, and it takes {_LEAST_BLOCKS}"
        return ClaimVerdict(claim, "cannot tell", conditions, reason)
    if idle:
        return ClaimVerdict(claim, "not exercised", conditions, "; ".join(idle))
    return ClaimVerdict(claim, _all_of([condition.verdict for condition in conditions]), conditions)


def _all_of(outcomes: Sequence[Verdict]) -> Verdict:
    if "does not hold" in outcomes:
        return "does not hold"
    return "cannot tell" if "cannot tell" in outcomes else "holds"


def _not_exercised(exercised: Exercised, results: Results, grid: Grid | None) -> str | None:
    """Why the mechanism cannot be said to have acted; None if it did."""
    quantity = exercised.quantity
    mean = interval(by_seed(quantity, results, grid)).mean
    if mean > exercised.above:
        return None
    return f"{quantity.measure} of {_arm_in_words(quantity)} is {mean:.4g}, and should be above {exercised.above:g}"


def _judge_condition(condition: Condition, results: Results, grid: Grid | None) -> ConditionVerdict:
    right = condition.right
    try:
        left_S = by_seed(condition.left, results, grid)
        right_S = by_seed(right, results, grid) if isinstance(right, Quantity) else [right] * len(left_S)
    except Unmeasured as reason:
        return ConditionVerdict("cannot tell", str(reason))
    pairs = [(left, condition.factor * right) for left, right in zip(left_S, right_S, strict=True)]
    means = interval(left_S).mean, interval(right_S).mean
    if condition.tolerance is None:
        difference = interval([left - target for left, target in pairs])
        outcome = _on_its_side(difference, condition.relation)
    else:
        shares = [_share(left, target) for left, target in pairs]
        if not all(math.isfinite(share) for share in shares):
            sentence = f"{_sides_in_words(condition, *means)}: there is no relative difference from 0"
            return ConditionVerdict("cannot tell", sentence, *means)
        difference = interval(shares)
        outcome = _within(difference, condition.tolerance)
    sentence = f"{_sides_in_words(condition, *means)}: {_difference_in_words(difference, condition.tolerance)}"
    return ConditionVerdict(outcome, sentence, *means, difference)


def _on_its_side(difference: Interval, relation: str) -> Verdict:
    low, high = (difference.low, difference.high) if relation != "above" else (-difference.high, -difference.low)
    if high < 0 or (high == 0 and relation == "at_most"):
        return "holds"
    return "does not hold" if low > 0 or (low == 0 and relation != "at_most") else "cannot tell"


def _within(share: Interval, tolerance: float) -> Verdict:
    if -tolerance <= share.low and share.high <= tolerance:
        return "holds"
    return "does not hold" if share.low > tolerance or share.high < -tolerance else "cannot tell"


def _share(left: float, target: float) -> float:
    """Difference as a share of the target; infinite from 0, unless there is no difference."""
    if left == target:
        return 0.0
    return (left - target) / target if target else math.inf


def _sides_in_words(condition: Condition, left_mean: float, right_mean: float) -> str:
    left, right = condition.left, condition.right
    factor = f"{condition.factor:g} * " if condition.factor != 1 else ""
    if isinstance(right, Quantity):
        measure = f"{right.measure} of " if right.measure != left.measure else ""
        against = f"{factor}{measure}{_arm_in_words(right)} {right_mean:.4g}"
    else:
        against = f"{factor}{right_mean:.4g}"
    return f"{left.measure}: {_arm_in_words(left)} {left_mean:.4g} against {against}"


def _arm_in_words(quantity: Quantity) -> str:
    match quantity.over:
        case AtPoint(value=value):
            return f"{quantity.arm} at {value:g}"
        case AtHighest(points=points):
            return f"{quantity.arm} (mean of the {points} highest points)"
        case AtBest():
            return f"{quantity.arm} at its best point"
        case Sensitivity():
            return f"{quantity.arm} (mean above its least)"
        case LargestStable():
            return f"{quantity.arm} (largest point without divergence)"
        case _:
            return quantity.arm


def _difference_in_words(difference: Interval, tolerance: float | None) -> str:
    percent = tolerance is not None

    def shown(value: float) -> str:
        return f"{100 * value:.3g} %" if percent else f"{value:.3g}"

    kind, asked = ("relative difference", f", asked for {shown(tolerance)}") if tolerance else ("difference", "")
    bounds = f" [{shown(difference.low)}, {shown(difference.high)}], {difference.n} seeds"
    return f"{kind} {shown(difference.mean)}{bounds if difference.n > 1 else ', 1 seed'}{asked}"
