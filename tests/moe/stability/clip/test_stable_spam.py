import math
from typing import Any

import pytest
import torch

from moe.config.clip import StableSpamClipConfig
from tests.moe.toy import Tensors, Toy, assert_close, by_unit, drawn, norm_of

MAX_DECAY, NORM_DECAY, SQUARE_DECAY, EVERY = 0.6, 0.7, 0.9, 4
CONFIG = StableSpamClipConfig(
    max_decay=MAX_DECAY, norm_decay=NORM_DECAY, norm_square_decay=SQUARE_DECAY, reset_every_steps=EVERY
)


def gradients_of(step: int) -> Tensors:
    gradients = drawn(step, scale=0.2 + 0.5 * (step % 3))
    if step in (2, 3):  # an expert that no token reaches
        gradients["layers.0.experts.w_up"][1] = gradients["layers.0.experts.w_down"][1] = 0.0
    if step == 5:
        gradients["layers.0.experts.w_down"][2, 1, 1] = 500.0
    return gradients


class Reference:
    """The paper's two rules, tensor by tensor; experts are tensors, and one with a gradient of zero is passed over."""

    def __init__(self) -> None:
        self.seen: dict[Any, int] = {}
        self.average: dict[Any, list[float]] = {}

    def clip(self, gradients: Tensors) -> tuple[dict[Any, torch.Tensor], float]:
        result, clipped, total = {}, 0, 0
        for unit, gradient in by_unit(gradients).items():
            g = gradient.double().clone()
            total += g.numel()
            largest = float(g.abs().max())
            if largest > 0:
                self.seen[unit] = self.seen.get(unit, 0) + 1
                t, (m, a, b) = self.seen[unit], self.average.get(unit, [0.0, 0.0, 0.0])
                m = MAX_DECAY * m + (1 - MAX_DECAY) * largest
                limit = m / (1 - MAX_DECAY**t)
                spikes = g.abs() > limit * (1 + 1e-9)
                clipped += int(spikes.sum())
                g[spikes] *= limit / largest
                norm = norm_of([g])
                a = NORM_DECAY * a + (1 - NORM_DECAY) * norm
                b = SQUARE_DECAY * b + (1 - SQUARE_DECAY) * norm**2
                scaled = (a / (1 - NORM_DECAY**t)) / (math.sqrt(b / (1 - SQUARE_DECAY**t)) + 1e-8)
                g *= scaled / norm
                self.average[unit] = [m, a, b]
            result[unit] = g
        return result, clipped / total


def test_elements_are_clipped_and_tensors_normalised() -> None:
    toy, reference = Toy(CONFIG), Reference()
    fractions = []
    for step in range(8):
        gradients = gradients_of(step)
        expected, fraction = reference.clip(gradients)
        clipped, figures = toy.clip(gradients)
        assert_close(by_unit(clipped), expected)
        assert figures["clipped_fraction"] == pytest.approx(fraction, abs=1e-12)
        assert figures["clipped"] == float(fraction > 0)
        fractions.append(fraction)
        state = toy.technique.state()
        for column, name in enumerate(("max", "norm", "norm_square")):
            want = [reference.average[unit][column] for unit in expected]
            assert state[name].tolist() == pytest.approx(want, rel=1e-5)
        assert state["seen"].tolist() == [reference.seen[unit] for unit in expected]
        if step == 5:
            assert float(clipped["layers.0.experts.w_down"].abs().max()) < 1.0
    assert fractions[0] == min(fractions) == 0.0
    assert max(fractions) > 0.01


def test_the_first_gradient_has_norm_one_and_no_spike() -> None:
    clipped, figures = Toy(StableSpamClipConfig()).clip(drawn(3, scale=1e-3))
    assert figures == {"clipped_fraction": 0.0, "clipped": 0.0}
    assert all(norm_of([g]) == pytest.approx(1.0, rel=1e-4) for g in by_unit(clipped).values())


def test_moments_are_reset_and_averages_are_not() -> None:
    toy = Toy(CONFIG)
    for step in range(3):
        toy.step(drawn(step))
    assert toy.optimizer.taken == 3
    fourth, _ = toy.clip(drawn(3))
    assert toy.optimizer.taken == 0
    assert not any(m.any() for m in [*toy.optimizer.exp_avg.values(), *toy.optimizer.exp_avg_sq.values()])
    assert toy.technique.state()["seen"].tolist() == [4] * 9
    toy.optimizer.step(1e-2)
    name = "layers.0.router.weight"
    torch.testing.assert_close(toy.optimizer.exp_avg[name], 0.1 * fourth[name])
