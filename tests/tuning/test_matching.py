import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning.matching import matched, matching_max_norm, matching_steps
from tuning.series import Series
from tuning.study_config import Arm


def series(norms: list[float], clipped: list[float] | None) -> Series:
    train = {"train/loss": [1.0] * len(norms), "train/grad_norm": norms}
    return Series("finished", len(norms), train | ({"train/clipped": clipped} if clipped is not None else {}), {})


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10_000), st.booleans()), min_size=1, unique_by=lambda step: step[0]))
def test_as_many_norms_lie_above_the_limit_as_steps_were_clipped(steps: list[tuple[int, bool]]) -> None:
    norms = [norm / 7 for norm, _ in steps]
    limit = matching_max_norm(series(norms, [float(clipped) for _, clipped in steps]))
    above = sum(norm > limit for norm in norms)
    clipped = sum(clipped for _, clipped in steps)
    # Where all are clipped, the limit is the least of them.
    assert above == min(clipped, len(steps) - 1)
    assert limit > 0


def test_steps_that_were_not_taken_have_no_part_in_it() -> None:
    nan = math.nan
    taken = matching_max_norm(series([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0]))
    assert 3.0 <= taken < 4.0
    assert matching_max_norm(series([nan, 1.0, 2.0, nan, 3.0, 4.0], [nan, 0.0, 0.0, nan, 0.0, 1.0])) == taken


def test_which_steps_were_clipped_does_not_matter() -> None:
    norms = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert matching_max_norm(series(norms, [0, 1, 0, 1, 0])) == matching_max_norm(series(norms, [1, 0, 1, 0, 0]))


def test_a_run_without_a_clip_has_no_rate_to_match() -> None:
    with pytest.raises(ValueError, match="has no clip"):
        matching_max_norm(series([1.0], None))


def timed(steps: int, seconds: list[float]) -> Series:
    train = {"train/loss": [1.0] * len(seconds), "train/step_seconds": seconds}
    return Series("finished", steps, train, {})


def test_the_steps_take_as_long_as_the_other_arm_whatever_single_steps_took() -> None:
    slow, quick = timed(200, [9.0, 0.03, 0.03, 0.03]), timed(200, [0.02, 0.02, 5.0, 0.02])
    assert matching_steps(slow, quick) == 300
    assert matching_steps(quick, slow) == 133
    assert matching_steps(timed(1, [0.1]), timed(1, [10.0])) == 1


def test_steps_that_a_run_did_not_do_count_with_those_it_did() -> None:
    """Its schedule is what is matched: an arm that diverged would have taken as long."""
    assert matching_steps(timed(100, [0.2] * 3), timed(100, [0.1] * 100)) == 200


def test_an_arm_takes_from_others_what_it_says() -> None:
    series_of = {"a": timed(10, [0.4]), "b": timed(10, [0.1])}
    longer = Arm.model_validate({"says": "x", "as_long_as": {"arm": "a", "paced_by": "b"}})
    assert matched(longer, series_of) == {"schedule": {"steps": 40}}
    assert matched(Arm(says="x"), {}) == {}
    tight = matched(Arm(says="x", clip_rate_of="c"), {"c": series([1.0, 2.0, 3.0], [0.0, 0.0, 1.0])})
    assert 2.0 <= tight["stability"]["clip"]["max_norm"] < 3.0
