import math

import pytest
import torch
from pydantic import ValidationError

from moe.config.clip import SpamClipConfig
from moe.config.optimizer import AdamwConfig
from tests.moe.stability.moments import START
from tests.moe.toy import Tensors, Toy, assert_close, drawn

THETA, EVERY, REWARMUP, SETTLE = 3.0, 5, 2, 2
CONFIG = SpamClipConfig(threshold=THETA, reset_every_steps=EVERY, rewarmup_steps=REWARMUP, settle_steps=SETTLE)
ADAM = AdamwConfig(beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
LR = 1e-2


def gradients_of(step: int) -> Tensors:
    gradients = drawn(step)
    gradients["embed.weight"][3] *= float(step > 6)  # a token that is first seen late, after a reset
    return gradients


class Reference:
    """Adam with SPAM, element by element, in Python's own numbers."""

    def __init__(self, weights: Tensors) -> None:
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.w = {name: weight.flatten().tolist() for name, weight in weights.items()}
        self.m = {name: [0.0] * len(w) for name, w in self.w.items()}
        self.v = {name: [0.0] * len(w) for name, w in self.w.items()}
        self.t = self.corrected = 0

    def step(self, gradients: Tensors) -> float:
        """One update; the share of elements that were clipped."""
        self.t += 1
        self.corrected += 1
        if self.t % EVERY == 0:
            self.corrected = 1
            self.m = {name: [0.0] * len(m) for name, m in self.m.items()}
            self.v = {name: [0.0] * len(v) for name, v in self.v.items()}
        lr = LR
        if self.t >= EVERY and self.t % EVERY < REWARMUP:
            lr *= 1 - 0.99 * (1 + math.cos(math.pi * (self.t % EVERY) / (REWARMUP + 1))) / 2
        clipped = total = 0
        for name, gradient in gradients.items():
            for i, g in enumerate(gradient.flatten().tolist()):
                m, v, w = self.m[name], self.v[name], self.w[name]
                total += 1
                if self.t % EVERY >= SETTLE and v[i] > 0 and g * g > THETA * v[i]:
                    g = math.copysign(math.sqrt(THETA * v[i]), g)
                    clipped += 1
                m[i] = 0.8 * m[i] + 0.2 * g
                v[i] = 0.9 * v[i] + 0.1 * g * g
                step = (m[i] / (1 - 0.8**self.corrected)) / (math.sqrt(v[i] / (1 - 0.9**self.corrected)) + 1e-6)
                decay = 0.3 if gradient.dim() > 1 else 0.0
                w[i] = w[i] * (1 - lr * decay) - lr * step
        return clipped / total

    def weights(self) -> Tensors:
        return {name: torch.tensor(w, dtype=torch.float64).view(self.shapes[name]) for name, w in self.w.items()}


def test_updates_are_those_of_adam_with_clipped_elements_and_resets() -> None:
    toy = Toy(CONFIG, ADAM)
    reference = Reference(toy.weights())
    for step in range(13):
        gradients = gradients_of(step)
        expected = reference.step(gradients)
        figures = toy.step(gradients, LR)
        assert figures["clipped_fraction"] == pytest.approx(expected, abs=1e-9)
        assert figures["clipped"] == float(expected > 0)
        assert (expected > 0) == ((step + 1) % EVERY >= SETTLE)
        assert_close(toy.weights(), reference.weights())
        assert toy.optimizer.taken == reference.corrected


def test_an_element_without_history_is_not_clipped_to_nothing() -> None:
    toy = Toy(SpamClipConfig(settle_steps=1), ADAM)
    quiet = drawn(1)
    quiet["embed.weight"][3] = 0.0
    for _ in range(3):
        toy.step(quiet)
    clipped, _ = toy.clip(drawn(2))
    assert clipped["embed.weight"][3].equal(drawn(2)["embed.weight"][3])


def test_the_learning_rate_comes_back_along_half_a_cosine() -> None:
    toy = Toy(SpamClipConfig(reset_every_steps=50, rewarmup_steps=10, settle_steps=1))
    factors = []
    for _ in range(70):
        toy.step(drawn(1))
        factors.append(toy.technique.lr_factor(START))
    assert factors[:49] == [1.0] * 49
    assert factors[49] == pytest.approx(0.01)
    assert factors[49:59] == sorted(factors[49:59])
    assert factors[54] == pytest.approx(1 - 0.99 * (1 + math.cos(math.pi * 5 / 11)) / 2)
    assert factors[59:] == [1.0] * 11


@pytest.mark.parametrize("key", ["rewarmup_steps", "settle_steps"])
def test_a_phase_that_outlasts_the_reset_is_refused(key: str) -> None:
    with pytest.raises(ValidationError, match=f"{key} .* must be less than reset_every_steps"):
        SpamClipConfig.model_validate({"reset_every_steps": 30, "rewarmup_steps": 2, "settle_steps": 2, key: 30})
