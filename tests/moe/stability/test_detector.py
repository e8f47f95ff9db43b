"""The spike detector against its rule written plainly, and on series whose events are known."""

import math
import statistics
from collections.abc import Sequence

import pytest
import torch

from moe.config.detector import RobustDetectorConfig
from moe.stability.detector import Reading, RobustScore, SpikeDetector

NAN, INFINITY = math.nan, math.inf


def noise(steps: int, level: float = 3.0, sigma: float = 0.05, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (level + sigma * torch.randn(steps, generator=generator, dtype=torch.float64)).tolist()


def flagged(losses: Sequence[float], config: RobustDetectorConfig | None = None) -> list[int]:
    """Steps (from 0) whose loss asks for an answer."""
    detector = SpikeDetector(config or RobustDetectorConfig())
    return [step for step, loss in enumerate(losses) if detector.see(loss, 1.0)[0].severity == "act"]


def plainly(values: Sequence[float], config: RobustDetectorConfig) -> list[float | None]:
    """Scores by the rule, over a list that only grows."""
    past: list[float] = []
    out: list[float] = []
    scores: list[float | None] = []
    for value in values:
        score = None
        if len(past) >= 29:
            first = max(9, len(past) - config.window)
            errors = [past[i] - statistics.median(past[i - 9 : i]) for i in range(first, len(past))]
            centre = statistics.median_low(errors)
            absolute = sorted(abs(error - centre) for error in errors)
            tenth_from_above = absolute[math.ceil(0.9 * len(absolute)) - 1]
            # Of a normal distribution: quantiles 3/4 and 19/20.
            scatter = max(statistics.median_low(absolute) / 0.67449, tenth_from_above / 1.64485)
            score = (value - statistics.median(past[-9:]) - centre) / scatter
        scores.append(score)
        if score is None or score < config.warn:
            past, out = [*past, value], []
        else:
            out.append(value)
            if len(out) == config.accept_after:
                past, out = past + out, []
    return scores


def test_scores_are_those_of_the_rule_written_plainly() -> None:
    config = RobustDetectorConfig(window=60, accept_after=12)
    values = noise(300)
    values[100] += 2.0
    values[140:150] = [value + 0.5 for value in values[140:150]]
    values[200:] = [value + 1.0 for value in values[200:]]  # a new level
    series = RobustScore(config)
    found = [series.see(value)[1] for value in values]
    expected = plainly(values, config)
    assert [score is None for score in found] == [score is None for score in expected]
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=1e-3)
    assert max(b for _, b in pairs) > 10


def test_a_spike_does_not_hide_the_smaller_ones_that_follow() -> None:
    losses = noise(500)
    losses[300], losses[330], losses[360] = 12.0, 5.0, 7.0
    assert flagged(losses) == [300, 330, 360]


@pytest.mark.parametrize("broken", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("where", ["loss", "grad_norm"])
def test_what_is_not_finite_is_flagged_at_once_and_leaves_the_past_as_it_was(broken: float, where: str) -> None:
    losses = noise(200)
    with_it, without = SpikeDetector(RobustDetectorConfig()), SpikeDetector(RobustDetectorConfig())
    for step, loss in enumerate(losses):
        if step in (0, 100):
            readings = with_it.see(broken, 1.0) if where == "loss" else with_it.see(9.0, broken)
            wrong = [reading for reading in readings if not math.isfinite(reading.value)]
            assert [(reading.series, reading.severity, reading.score) for reading in wrong] == [(where, "act", None)]
            assert [r.severity for r in readings if math.isfinite(r.value)] == ["none"]
        assert with_it.see(loss, 1.0) == without.see(loss, 1.0)


def test_a_level_that_stays_is_accepted_after_so_many_steps() -> None:
    losses = [*noise(200), *noise(200, level=6.0)]
    assert flagged(losses, RobustDetectorConfig(accept_after=15)) == list(range(200, 215))


def test_after_a_new_level_spikes_on_top_of_it_are_seen() -> None:
    losses = [*noise(200), *noise(200, level=6.0)]
    losses[300] = 7.0
    assert flagged(losses, RobustDetectorConfig(accept_after=15))[15:] == [300]


def test_a_descent_raises_no_alarm_and_hides_no_spike() -> None:
    descent = [2.0 + 8.0 * math.exp(-step / 60) + error for step, error in enumerate(noise(400, level=0.0))]
    assert flagged(descent) == []
    for step in (50, 80, 120, 300):
        spiked = [*descent[:step], descent[step] + 1.0, *descent[step + 1 :]]
        assert flagged(spiked) == [step]


def test_a_fall_is_no_spike() -> None:
    losses = noise(300)
    losses[200] = 0.0
    losses[250:] = noise(50, level=1.0)
    assert flagged(losses) == []


def test_gradient_norms_are_judged_by_their_ratio() -> None:
    """The same noise and the same spike a thousand times smaller give the same scores."""
    norms = [math.exp(value) for value in noise(200, level=0.0, sigma=0.2)]
    norms[150] *= 30
    large, small = SpikeDetector(RobustDetectorConfig()), SpikeDetector(RobustDetectorConfig())
    for norm in norms:
        a, b = large.see(3.0, norm)[1], small.see(3.0, norm / 1000)[1]
        assert a.severity == b.severity
        if a.score is not None and a.baseline is not None:
            assert b.score == pytest.approx(a.score, rel=1e-6)
            assert b.baseline == pytest.approx(a.baseline / 1000, rel=1e-6)
    assert large.see(3.0, 30.0)[1].severity == "act"


def test_the_baseline_is_what_was_to_be_expected() -> None:
    detector = SpikeDetector(RobustDetectorConfig())
    readings = [detector.see(loss, norm) for loss, norm in zip(noise(200), noise(200, level=0.7), strict=True)]
    loss, norm = readings[-1]
    assert loss.baseline == pytest.approx(3.0, abs=0.05)
    assert norm.baseline == pytest.approx(0.7, abs=0.05)


def test_a_constant_series_has_no_spikes_but_a_jump_of_it_is_one() -> None:
    losses = [3.0] * 100
    assert flagged(losses) == []
    losses[60] = 3.1
    assert flagged(losses) == [60]


def test_a_zero_gradient_is_a_number() -> None:
    detector = SpikeDetector(RobustDetectorConfig())
    assert all(reading.severity == "none" for loss in noise(100) for reading in detector.see(loss, 0.0))


def test_between_the_limits_is_a_warning() -> None:
    config = RobustDetectorConfig(warn=4.0, act=20.0)
    detector = SpikeDetector(config)
    severities: list[Reading] = []
    losses = noise(200)
    losses[150] = 3.0 + 10 * 0.05
    for loss in losses:
        severities.append(detector.see(loss, 1.0)[0])
    assert [step for step, reading in enumerate(severities) if reading.severity != "none"] == [150]
    assert severities[150].severity == "warn"


def test_a_detector_whose_state_is_filled_in_goes_on_as_the_other_would_have() -> None:
    losses = noise(300)
    losses[140] = 9.0
    losses[195:205] = [8.0] * 10  # the cut lies inside a level that is kept out
    whole = SpikeDetector(RobustDetectorConfig())
    for loss in losses[:200]:
        whole.see(loss, loss / 3)
    resumed = SpikeDetector(RobustDetectorConfig())
    for name, tensor in resumed.state().items():
        tensor.copy_(whole.state()[name])
    for loss in losses[200:]:
        assert resumed.see(loss, loss / 3) == whole.see(loss, loss / 3)


def test_a_limit_to_act_on_below_the_warning_is_refused() -> None:
    with pytest.raises(ValueError, match=r"act \(4\) is below warn \(4.5\)"):
        RobustDetectorConfig(act=4.0)


@pytest.mark.parametrize(("ratio", "severity"), [(3.0, "none"), (8.0, "warn"), (40.0, "act")])
def test_a_gradient_norm_must_be_a_multiple_of_what_was_to_be_expected(ratio: float, severity: str) -> None:
    detector = SpikeDetector(RobustDetectorConfig())
    for norm in noise(100, level=1.0, sigma=0.01):
        detector.see(3.0, norm)
    reading = detector.see(3.0, ratio)[1]
    assert reading.score is not None
    assert reading.score > 50
    assert reading.severity == severity
    # A loss has no such limit.
    for loss in noise(100, level=1.0, sigma=0.01):
        detector.see(loss, 1.0)
    assert detector.see(3.0, 1.0)[0].severity == "act"


def test_a_window_that_says_nothing_of_the_scatter_is_refused() -> None:
    """The detector would wait for 20 errors for ever."""
    with pytest.raises(ValueError, match="greater than or equal to 20"):
        RobustDetectorConfig(window=19)
    assert flagged([*noise(60), 9.0], RobustDetectorConfig(window=20)) == [60]


def test_a_ratio_to_act_on_below_the_warning_is_refused() -> None:
    with pytest.raises(ValueError, match=r"act_norm_ratio \(2\) is below warn_norm_ratio \(5\)"):
        RobustDetectorConfig(act_norm_ratio=2.0)


def test_a_router_that_collapses_is_seen_in_the_load_and_a_well_balanced_one_may_stir() -> None:
    detector = SpikeDetector(RobustDetectorConfig())
    load = noise(100, level=0.08, sigma=0.01)
    for max_vio in load:
        assert {r.severity for r in detector.see(3.0, 1.0, max_vio)} == {"none"}
    stirred = detector.see(3.0, 1.0, 0.4)[2]
    assert stirred.score is not None
    assert stirred.score > 20
    assert stirred.severity == "none"  # less than half a mean load more
    collapsed = detector.see(3.0, 1.0, 1.0)[2]
    assert (collapsed.series, collapsed.severity, collapsed.value) == ("max_vio", "act", 1.0)
    assert collapsed.baseline == pytest.approx(0.08, abs=0.02)


def test_without_experts_there_is_no_reading_of_their_load() -> None:
    assert [reading.series for reading in SpikeDetector(RobustDetectorConfig()).see(3.0, 1.0)] == ["loss", "grad_norm"]
