"""Muon against the plain formula in numpy; which parameters are its, and how they are cut into matrices."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from moe.config.model import ModelConfig
from moe.config.optimizer import MuonConfig
from moe.layers.experts import Experts
from moe.layers.ffn import FeedForward
from moe.layers.linear import Linear
from moe.model import Transformer
from moe.optim import AdamW, Muon, build_optimizer
from moe.optim.muon import stacked_matrices
from moe.parallel import Ranks
from moe.parameters import ParameterSet
from pipelines.loading import load_config, preset_names
from tests.moe.build import ALONE
from tests.moe.tiny import tiny_config, tiny_trainer
from tests.moe.toy import Holder, Tensors

# Name -> shape, and the matrices that are stacked in its rows; 0 for AdamW's.
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "embed.weight": ((9, 8), 0),
    "layers.0.attention_norm.weight": ((8,), 0),
    "layers.0.attention.q_proj.weight": ((12, 8), 1),
    "layers.0.attention.kv_up.weight": ((20, 5), 1),
    "layers.0.ffn_connection.down.weight": ((6, 8), 0),
    "layers.0.ffn.gate_up.weight": ((12, 8), 2),
    "layers.1.ffn.router.weight": ((3, 8), 0),
    "layers.1.ffn.experts.w_up": ((3, 10, 8), 2),
    "layers.1.ffn.experts.w_down": ((3, 8, 5), 1),
    "head.weight": ((9, 8), 0),
}
LR = 3e-2
EXPERTS = ("layers.1.ffn.experts.w_up", "layers.1.ffn.experts.w_down")


def drawn(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, (shape, _) in SHAPES.items()}


def gradients_of(step: int) -> Tensors:
    gradients = drawn(100 + step)
    for name in EXPERTS:
        gradients[name][1] *= float(step not in (1, 2))  # an expert that idles
        gradients[name][0] *= 1e-3
    return gradients


class Subject:
    """The parameters and Muon, whose gradients a test sets."""

    def __init__(self, **keys: Any) -> None:
        model = Holder()
        for name, tensor in drawn(0).items():
            model.put(name, tensor)
        self.parameters = ParameterSet(model, ALONE, dense_is_sharded=False)
        optimizer = build_optimizer(MuonConfig.model_validate(keys), self.parameters)
        assert isinstance(optimizer, Muon)
        self.optimizer = optimizer

    def step(self, gradients: Tensors, lr: float = LR) -> dict[str, float]:
        for p in self.parameters.all:
            p.handle.grad = gradients[p.name].clone()
        return self.optimizer.step(lr)

    def weights(self) -> Tensors:
        return {p.name: p.local.clone() for p in self.parameters.all}


def orthogonal(x: np.ndarray) -> np.ndarray:
    x = x / np.sqrt((x**2).sum()) if x.any() else x
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def reference(steps: int, c: MuonConfig) -> dict[str, np.ndarray]:
    """Matrix by matrix and, for the others, number by number, in fp64."""
    weights = {name: tensor.double().numpy().copy() for name, tensor in drawn(0).items()}
    momentum = {name: np.zeros_like(w) for name, w in weights.items()}
    second = {name: np.zeros_like(w) for name, w in weights.items()}
    for step in range(steps):
        lr = LR / (step + 1)
        for name, gradient in gradients_of(step).items():
            w, g, stacked = weights[name], gradient.double().numpy(), SHAPES[name][1]
            if stacked:
                momentum[name] = c.momentum * momentum[name] + g
                direction = c.momentum * momentum[name] + g
                experts = direction.reshape(-1, *direction.shape[-2:])
                update = []
                for matrix in (part for expert in experts for part in np.split(expert, stacked)):
                    update.append(orthogonal(matrix) * np.sqrt(max(matrix.shape)) * c.update_rms)
                w *= 1 - lr * c.weight_decay
                w -= lr * np.concatenate(update).reshape(w.shape)
                continue
            momentum[name] = c.beta1 * momentum[name] + (1 - c.beta1) * g
            second[name] = c.beta2 * second[name] + (1 - c.beta2) * g * g
            m, v = momentum[name] / (1 - c.beta1 ** (step + 1)), second[name] / (1 - c.beta2 ** (step + 1))
            decays = w.ndim > 1 and (c.decay_router or "router" not in name)
            w *= 1 - lr * c.weight_decay * decays
            w -= lr * m / (np.sqrt(v) + c.eps)
    return weights


@pytest.mark.parametrize("keys", [{}, {"weight_decay": 0.7, "momentum": 0.8, "update_rms": 0.4, "decay_router": False}])
def test_updates_are_those_of_the_plain_formula(keys: dict[str, Any]) -> None:
    subject = Subject(**keys)
    for step in range(6):
        assert subject.step(gradients_of(step), LR / (step + 1)) == {}
        if step == 3:
            subject.optimizer.restore(subject.optimizer.taken)
    assert subject.optimizer.taken == 6
    want = reference(6, subject.optimizer.config)
    for name, weight in subject.weights().items():
        np.testing.assert_allclose(weight.numpy(), want[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_matrix_moves_by_gamma_whatever_its_shape_and_its_gradient(dtype: str) -> None:
    subject = Subject(weight_decay=0.0, newton_schulz_dtype=dtype, update_rms=0.3)
    before = subject.weights()
    gradients = gradients_of(0)
    for name in gradients:
        gradients[name] *= 1e-4
    subject.step(gradients, 1.0)
    for name, after in subject.weights().items():
        stacked = SHAPES[name][1]
        if stacked:
            moved = (before[name] - after).double()
            matrices = moved.reshape(-1, moved.shape[-2] // stacked, moved.shape[-1])
            rms = matrices.square().mean(dim=(1, 2)).sqrt()
            assert (rms / 0.3 - 1).abs().max() < (0.01 if dtype == "fp32" else 0.03), (name, rms)


def test_a_matrix_without_gradient_decays_alone_and_its_momentum_fades() -> None:
    name = EXPERTS[0]
    subject = Subject(weight_decay=0.5)
    nothing = {n: torch.zeros_like(t) for n, t in drawn(0).items()}
    start = subject.weights()[name]
    subject.step(nothing, 0.1)
    torch.testing.assert_close(subject.weights()[name], start * (1 - 0.1 * 0.5))
    gradients = gradients_of(0)
    gradients[name][2] = 0.0
    subject.step(gradients, 0.1)
    held, before = subject.optimizer.momentum[name].clone(), subject.weights()[name]
    torch.testing.assert_close(held, gradients[name])
    subject.step(nothing, 0.1)
    torch.testing.assert_close(subject.optimizer.momentum[name], 0.95 * held)
    after = subject.weights()[name]
    torch.testing.assert_close(after[2], before[2] * (1 - 0.1 * 0.5))
    going_on = before[0] * (1 - 0.1 * 0.5) - after[0]
    assert torch.nn.functional.cosine_similarity(going_on.flatten(), gradients[name][0].flatten(), dim=0) > 0.5


def test_a_backward_that_leaves_no_gradient_is_one_of_zeros() -> None:
    subject, other = Subject(), Subject()
    for s in (subject, other):
        s.step(gradients_of(0))
    for p in subject.parameters.all:
        p.handle.grad = None
    subject.optimizer.step(LR)
    other.step({name: torch.zeros_like(tensor) for name, tensor in drawn(0).items()})
    for name, weight in other.weights().items():
        assert subject.weights()[name].equal(weight), name


def test_a_reset_forgets_every_moment() -> None:
    subject, fresh = Subject(weight_decay=0.0), Subject(weight_decay=0.0)
    subject.step(gradients_of(0))
    subject.optimizer.reset()
    assert subject.optimizer.taken == 0
    moments = subject.optimizer.moments()
    assert moments.keys() == {"momentum", "exp_avg", "exp_avg_sq"}
    assert not any(tensor.any() for by_name in moments.values() for tensor in by_name.values())
    start = subject.weights()
    subject.step(gradients_of(1))
    began = fresh.weights()
    fresh.step(gradients_of(1))
    for name in SHAPES:
        moved, expected = start[name] - subject.weights()[name], began[name] - fresh.weights()[name]
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_bf16_moments_are_rounded_after_the_update_that_they_made() -> None:
    rounded, exact = Subject(moments="bf16"), Subject()
    for subject in (rounded, exact):
        subject.step(gradients_of(0))
    name = EXPERTS[0]
    assert {t.dtype for by_name in rounded.optimizer.moments().values() for t in by_name.values()} == {torch.bfloat16}
    torch.testing.assert_close(rounded.weights()[name], exact.weights()[name], rtol=1e-6, atol=1e-7)
    assert rounded.optimizer.momentum[name].equal(exact.optimizer.momentum[name].bfloat16())


# ---- which parameters ------------------------------------------------------------------------------------------------

ARCHITECTURES: dict[str, ModelConfig] = {
    name: load_config([name], ["model.mtp.depth=1", "model.vocab_size=64"]).model for name in preset_names()
}
ARCHITECTURES["every norm"] = tiny_config(
    {"model": {"norm_placement": "sandwich", "attention": {"qk_norm": True}, "moe": {"output_norm": True}}}
).model


def expected_matrices(model: nn.Module) -> dict[str, int]:
    """By the modules that hold the parameters: products but the head's, and experts."""
    expected = dict.fromkeys((name for name, _ in model.named_parameters()), 0)
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name != "head":
            expected[f"{name}.weight"] = 1
        if isinstance(module, Experts):
            expected |= {f"{name}.w_up": 2, f"{name}.w_down": 1}
    for name, module in model.named_modules():
        if isinstance(module, FeedForward):
            expected[f"{name}.gate_up.weight"] = 2
    return expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_of_every_architecture_is_assigned(name: str) -> None:
    meta = torch.device("meta")
    with meta:
        model = Transformer(ARCHITECTURES[name], Ranks(meta))
    got = {parameter: stacked_matrices(parameter) for parameter, _ in model.named_parameters()}
    assert got == expected_matrices(model)
    for parameter, tensor in model.named_parameters():
        is_adamws = tensor.dim() == 1 or parameter in ("embed.weight", "head.weight")
        is_adamws = is_adamws or ".router." in parameter or "connection." in parameter
        assert is_adamws == (got[parameter] == 0)
        assert not got[parameter] or tensor.shape[-2] % got[parameter] == 0


def test_what_is_not_known_is_left_to_adamw() -> None:
    for name in (
        "attention_connection.gate_up.weight",
        "connection.down.weight",
        "new.weight",
        "attention.gate.weight",
    ):
        assert stacked_matrices(f"layers.0.{name}") == 0
    for name, (_, stacked) in SHAPES.items():
        assert stacked_matrices(name) == stacked or "connection" in name
    assert Subject().optimizer.momentum.keys() == {name for name, (_, stacked) in SHAPES.items() if stacked}


# ---- config ----------------------------------------------------------------------------------------------------------


def test_a_preset_takes_muon_by_its_kind() -> None:
    config = load_config(["micro"], ["optimizer.kind=muon", "optimizer.lr=2e-3", "optimizer.momentum=0.9"]).optimizer
    assert isinstance(config, MuonConfig)
    assert (config.lr, config.momentum, config.update_rms, config.weight_decay) == (2e-3, 0.9, 0.18, 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stability": {"clip": {"kind": "spam"}}}, "stability.clip.kind is spam.*set clip.kind to stable_spam"),
        ({"optimizer": {"weight_decay": 0.0, "decay_router": False}}, "decay_router=false has no effect"),
        ({"optimizer": {"moments": "bf16", "momentum": 0.999}}, "moments=bf16 needs momentum of at most"),
        ({"optimizer": {"momentum": 1.0}}, "momentum"),
    ],
)
def test_options_that_cannot_act_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_config({"optimizer": {"kind": "muon"}}, changes)


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_tiny_model_learns() -> None:
    muon = {"optimizer": {"kind": "muon", "lr": 5e-3}, "stability": {"clip": {"kind": "stable_spam"}}}
    trainer = tiny_trainer(tiny_config(muon))
    assert isinstance(trainer.optimizer, Muon)
    assert not isinstance(trainer.optimizer, AdamW)
    losses = [trainer.step().metrics["train/loss"] for _ in range(20)]
    assert sum(losses[-3:]) / 3 < losses[0] - 0.3
