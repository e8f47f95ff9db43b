from typing import Any

import pytest
import torch

from moe.config.clip import AdaGcClipConfig
from tests.moe.toy import Tensors, Toy, assert_close, by_unit, drawn, norm_of

WARMUP, RELATIVE, DECAY, MAX_NORM = 3, 1.2, 0.7, 2.0
CONFIG = AdaGcClipConfig(relative_limit=RELATIVE, decay=DECAY, warmup_steps=WARMUP, warmup_max_norm=MAX_NORM)
LATE = ("layers.0.experts.w_up", 2)
"""An expert that no token reaches before the warm-up is over."""


def gradients_of(step: int) -> Tensors:
    gradients = drawn(step, scale=0.5 + 0.3 * (step % 3))
    for name in ("layers.0.experts.w_up", "layers.0.experts.w_down"):
        gradients[name][1] *= float(step not in (1, 4))  # one expert idles in the warm-up, and once after it
        gradients[name][2] *= float(step > 4)
    if step == 6:
        gradients["layers.0.experts.w_up"][0] *= 100.0
    return gradients


class Reference:
    """Algorithm 1 tensor by tensor; experts are tensors, and one with a gradient of zero is passed over."""

    def __init__(self) -> None:
        self.average: dict[Any, float] = {}
        self.step = 0

    def clip(self, gradients: Tensors) -> dict[Any, torch.Tensor]:
        whole = norm_of(list(gradients.values()))
        result = {}
        for unit, gradient in by_unit(gradients).items():
            norm = norm_of([gradient])
            if self.step < WARMUP:
                factor = min(1.0, MAX_NORM / whole)
                if norm > 0:
                    self.average[unit] = min(self.average.get(unit, factor * norm), factor * norm)
            elif norm == 0:
                factor = 1.0
            else:
                old = self.average.setdefault(unit, norm)
                factor = min(1.0, RELATIVE * old / norm)
                self.average[unit] = DECAY * old + (1 - DECAY) * factor * norm
            result[unit] = factor * gradient
        self.step += 1
        return result


def test_each_tensor_and_each_expert_is_clipped_to_its_own_average() -> None:
    toy, reference = Toy(CONFIG), Reference()
    for step in range(9):
        gradients = gradients_of(step)
        before = dict(reference.average)
        expected = reference.clip(gradients)
        clipped, figures = toy.clip(gradients)
        assert_close(by_unit(clipped), expected)
        got = dict(zip(expected, toy.technique.state()["average"].tolist(), strict=True))
        assert got == pytest.approx({unit: reference.average.get(unit, 0.0) for unit in expected}, rel=1e-5)
        after, whole = norm_of(list(expected.values())), norm_of(list(gradients.values()))
        assert figures["clip_factor"] == pytest.approx(after / whole, rel=1e-5)
        assert figures["clipped"] == float(after < whole * (1 - 1e-6))
        if step == 4:
            idle = {unit for unit in expected if unit[1] == 1 and len(unit) == 2}
            assert len(idle) == 2
            assert all(reference.average[unit] == before[unit] for unit in idle)
        if step == 5:
            assert LATE not in before
            assert LATE in reference.average
        if step == 6:
            units = by_unit(gradients)
            spiked = [u for u in expected if norm_of([expected[u]]) < 0.1 * norm_of([units[u]])]
            assert spiked == [("layers.0.experts.w_up", 0)], "the spike of one expert is its own"
            assert 0 < figures["clipped_tensors"] < 1


def test_an_idle_expert_begins_again_from_where_it_was() -> None:
    toy = Toy(AdaGcClipConfig(relative_limit=1.5, warmup_steps=1, warmup_max_norm=1e9))
    gradients = drawn(1)
    toy.clip(gradients)
    idle = {name: gradient.clone() for name, gradient in gradients.items()}
    idle["layers.0.experts.w_up"][1] = 0.0
    for _ in range(50):
        toy.clip(idle)
    clipped, figures = toy.clip(gradients)
    assert_close(clipped, gradients)
    assert figures["clipped"] == 0.0
