"""AdamW's options against a loop over single numbers, and on any division of the ranks."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from moe.config.clip import NoClipConfig
from moe.config.optimizer import AdamwConfig
from moe.optim import AdamW
from tests.distributed import run_distributed
from tests.moe.divisions import (
    DIVISIONS,
    Cases,
    Run,
    Tolerance,
    assert_same_training,
    by_corner,
    reference,
    resumed,
    runs_of,
)
from tests.moe.tiny import tiny_config
from tests.moe.toy import Tensors, Toy, assert_close, by_unit, drawn

LR = 3e-2


def bf16(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float64).to(torch.bfloat16))


class Reference:
    """AdamW in Python's own numbers, tensor by tensor, each expert one."""

    def __init__(self, weights: Tensors, config: AdamwConfig, decays: Callable[[str], bool] | None = None) -> None:
        self.c = config
        self.units = {unit: weight.flatten().tolist() for unit, weight in by_unit(weights).items()}
        self.m = {unit: [0.0] * len(w) for unit, w in self.units.items()}
        self.v = {unit: [0.0] * len(w) for unit, w in self.units.items()}
        self.decays = decays or (lambda name: "norm" not in name)
        self.t = 0
        self.rms: list[float] = []

    def step(self, gradients: Tensors, lr: float) -> None:
        c = self.c
        self.t += 1
        self.rms.append(0.0)
        for unit, gradient in by_unit(gradients).items():
            w, m, v, g = self.units[unit], self.m[unit], self.v[unit], gradient.flatten().tolist()
            m[:] = [c.beta1 * a + (1 - c.beta1) * b for a, b in zip(m, g, strict=True)]
            v[:] = [c.beta2 * a + (1 - c.beta2) * b * b for a, b in zip(v, g, strict=True)]
            m_hat = [a / (1 - c.beta1**self.t) for a in m]
            v_hat = [a / (1 - c.beta2**self.t) for a in v]
            rate = lr
            if c.update_clip == "rms":
                rms = math.sqrt(sum(b * b / max(a, c.eps**2) for a, b in zip(v_hat, g, strict=True)) / len(g))
                self.rms[-1] = max(self.rms[-1], rms)
                rate /= max(1.0, rms)
            decay = c.weight_decay if self.decays(unit if isinstance(unit, str) else unit[0]) else 0.0
            for i in range(len(w)):
                w[i] -= rate * (decay * w[i] + m_hat[i] / (math.sqrt(v_hat[i]) + c.eps))
            if c.moments == "bf16":
                m[:], v[:] = [bf16(a) for a in m], [bf16(a) for a in v]

    def assert_equal(self, got: Tensors, rtol: float = 1e-5) -> None:
        weights = {unit: torch.tensor(w, dtype=torch.float64) for unit, w in self.units.items()}
        assert_close({unit: weight.flatten() for unit, weight in by_unit(got).items()}, weights, rtol)


def gradients_of(step: int) -> Tensors:
    gradients = drawn(step, scale=0.1)
    for name in ("layers.0.experts.w_up", "layers.0.experts.w_down"):
        gradients[name][1] *= float(step not in (1, 2))  # an expert that idles
    if step == 4:
        gradients["layers.0.experts.w_up"][0] *= 30.0  # one that spikes
        gradients["embed.weight"] *= 10.0
    return gradients


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no decay of embedding": {"decay_embeddings": False},
    "no decay of router": {"decay_router": False},
    "bf16": {"moments": "bf16"},
    # The floor of eps^2 under the second moment holds for about one element in ten.
    "rms": {"update_clip": "rms", "eps": 1e-2},
    "rms in bf16": {"update_clip": "rms", "moments": "bf16", "decay_embeddings": False, "decay_router": False},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_updates_are_those_of_a_loop_over_single_numbers(option: str) -> None:
    keys = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.3, **OPTIONS[option]}
    config = AdamwConfig.model_validate(keys)
    kept = {"norm": False, "embed": config.decay_embeddings, "router": config.decay_router}
    toy = Toy(NoClipConfig(), config)
    reference = Reference(
        toy.weights(), config, lambda name: all(decays for part, decays in kept.items() if part in name)
    )
    for step in range(7):
        gradients = gradients_of(step)
        toy.clip(gradients)
        figures = toy.optimizer.step(LR / (step + 1))
        reference.step(gradients, LR / (step + 1))
        if config.update_clip == "rms":
            assert figures["update_rms_max"] == pytest.approx(reference.rms[-1], rel=1e-5)
        else:
            assert figures == {}
        if step == 3:
            toy.optimizer.restore(toy.optimizer.taken)
    # Two of bf16's roundings may fall the other way than in Python's numbers.
    reference.assert_equal(toy.weights(), 1e-5 if config.moments == "fp32" else 1e-4)
    if config.update_clip == "rms":
        assert max(reference.rms) > 1.9
        assert min(reference.rms) < 1.1


def test_a_spike_slows_its_own_tensor_alone() -> None:
    clipped, plain = (
        Toy(NoClipConfig(), AdamwConfig.model_validate({"update_clip": kind, "weight_decay": 0.5}))
        for kind in ("rms", "none")
    )
    for toy in (clipped, plain):
        for step in range(5):
            gradients = drawn(1, scale=0.1)
            gradients["layers.0.experts.w_up"][0] *= 50.0 if step == 4 else 1.0
            before = toy.weights()
            toy.clip(gradients)
            toy.optimizer.step(LR)
    got, want, start = by_unit(clipped.weights()), by_unit(plain.weights()), by_unit(before)
    slowed = [unit for unit in want if (got[unit] - want[unit]).abs().max() > 1e-4]
    assert slowed == [("layers.0.experts.w_up", 0)]
    # With the betas 0.9 and 0.95 the corrected second moment after the fifth gradient is 0.221 of a spike's square.
    factor = 1 / math.sqrt((1 - 0.95**5) / 0.05)
    unit = slowed[0]
    torch.testing.assert_close(got[unit] - start[unit], (want[unit] - start[unit]) * factor, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("keys", [{}, {"moments": "bf16"}, {"update_clip": "rms"}], ids=["fused", "bf16", "rms"])
def test_an_epsilon_of_1e_20_divides_nothing_by_zero(keys: dict[str, Any]) -> None:
    """Gradients of zero, and those whose square is zero or denormal in fp32, make steps of the right size."""
    sizes = [0.0, 1e-30, 1e-21, 1e-19, 1e-15, 1e-10, 1e-3, 1.0]
    toy = Toy(NoClipConfig(), AdamwConfig.model_validate({"eps": 1e-20, "weight_decay": 0.0, **keys}))
    gradients = {name: torch.zeros_like(tensor) for name, tensor in drawn(0).items()}
    gradients["embed.weight"].view(-1)[: len(sizes)] = torch.tensor(sizes)
    before = toy.weights()
    for _ in range(3):
        toy.clip(gradients)
        toy.optimizer.step(LR)
    for name, weight in toy.weights().items():
        if name != "embed.weight":
            assert weight.equal(before[name])
    moved = (before["embed.weight"] - toy.weights()["embed.weight"]).flatten().tolist()
    assert moved[len(sizes) :] == [0.0] * (36 - len(sizes))
    for got, size in zip(moved, sizes, strict=False):
        # bf16 keeps a second moment from 1e-40 up: below that a gradient of 1e-21 is divided by eps alone.
        assert got == pytest.approx(3 * LR * size / (size + 1e-20), rel=0.15, abs=1e-6), size


def test_bf16_moments_are_kept_rounded_to_nearest() -> None:
    toy = Toy(NoClipConfig(), AdamwConfig(moments="bf16"))
    gradients = drawn(1)
    toy.clip(gradients)
    toy.optimizer.step(LR)
    for name, gradient in gradients.items():
        m, v = toy.optimizer.exp_avg[name], toy.optimizer.exp_avg_sq[name]
        assert m.dtype == v.dtype == torch.bfloat16
        torch.testing.assert_close(m, (0.1 * gradient).bfloat16(), rtol=0, atol=0)
        torch.testing.assert_close(v, (0.05 * gradient.double().square()).bfloat16(), rtol=2**-7, atol=0)
        assert (v == (0.05 * gradient.double().square()).bfloat16()).float().mean() > 0.9


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eps": 1e-21}, "eps"),
        ({"moments": "bf16", "beta2": 0.999}, "moments=bf16 needs beta2 of at most 0.9961"),
        ({"moments": "bf16", "beta1": 0.999}, "moments=bf16 needs beta1 of at most 0.9961"),
        ({"weight_decay": 0.0, "decay_embeddings": False}, "decay_embeddings=false has no effect"),
        ({"weight_decay": 0.0, "decay_router": False}, "decay_router=false has no effect"),
    ],
)
def test_options_without_effect_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AdamwConfig.model_validate(keys)


@pytest.mark.parametrize("beta", [1 - 2**-8, 1 - 2**-7])
def test_a_bf16_moment_fades_at_every_beta_that_is_allowed(beta: float) -> None:
    assert AdamwConfig(moments="bf16", beta2=beta).beta2 == beta
    mantissas = (1 + torch.arange(128) / 128).bfloat16()
    assert ((mantissas.float() * beta).bfloat16() < mantissas).all()


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ({"optimizer": {"decay_router": False}}, "optimizer.decay_router"),
        ({"stability": {"clip": {"kind": "group", "experts_max_norm": 1.0}}}, "stability.clip.experts_max_norm"),
        ({"stability": {"clip": {"kind": "group", "router_max_norm": 1.0}}}, "stability.clip.router_max_norm"),
    ],
)
def test_options_of_experts_are_refused_for_a_dense_model(option: dict[str, Any], key: str) -> None:
    dense = {"model": {"moe": {"num_experts": 0, "num_shared_experts": 0}}, "stability": {"balance": {"kind": "none"}}}
    with pytest.raises(ValidationError, match=f"{key} has no effect"):
        tiny_config(dense, option)


def test_update_clipping_without_whole_tensors_is_refused() -> None:
    parameters = Toy(NoClipConfig()).parameters
    with pytest.raises(ValueError, match="needs units"):
        AdamW(parameters.all, AdamwConfig(update_clip="rms"))


# ---- ranks -----------------------------------------------------------------------------------------------------------

CASES: Cases = {name: [{"optimizer": OPTIONS[name]}] for name in ("bf16", "rms", "rms in bf16")}
CASES["no decay"] = [{"optimizer": {"decay_embeddings": False, "decay_router": False}}]
# Update clipping acts where eps is below the gradients, whose elements are about 1e-3 here.
CASES |= {name: [*changes, {"optimizer": {"eps": 1e-5}}] for name, changes in CASES.items() if "rms" in name}
# A moment next to a tie rounds the other way where a sum's last bit differs. Measured: weights 3e-5, moments 9e-4.
TOLERANCES = {name: Tolerance(weights=1e-4, moments=4e-3) for name in CASES if "bf16" in name}
# Those whose state has another form than plain AdamW's, with and without the rest.
REMEMBERING = {name: CASES[name] for name in ("bf16", "rms in bf16")}


@functools.cache
def one_process() -> dict[str, Run]:
    return reference(CASES)


def test_the_cases_exercise_what_is_compared() -> None:
    runs = one_process()
    for name, run in runs.items():
        largest = [step.get("train/update_rms_max", 0.0) for step in run.metrics]
        assert (max(largest) > 1.2) == ("rms" in name), (name, largest)
        moments = {tensor.dtype for key, tensor in run.state.items() if key.startswith("optimizer.")}
        assert moments == {torch.bfloat16 if "bf16" in name else torch.float32}


@by_corner
def test_two_ranks_update_as_one_process_does(division: str) -> None:
    assert_same_training(runs_of(CASES, division), one_process(), TOLERANCES)


@pytest.mark.parametrize(("world", "division"), [(1, "replicas"), (2, "ep2-sharded")])
def test_a_saved_state_continues_bit_for_bit(world: int, division: str) -> None:
    for broken in run_distributed(resumed, world, REMEMBERING, DIVISIONS[division], (1, 3), timeout_s=240):
        assert broken == []
