"""A handful of parameters with the names of a model's, whose gradients a test sets itself."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moe.config.base import Config
from moe.config.model import ModelConfig
from moe.config.optimizer import AdamwConfig
from moe.optim import AdamW
from moe.parameters import ParameterSet
from moe.stability.clip import CLIP
from moe.stability.technique import GradientNorms
from moe.units import Units
from tests.moe.build import ALONE
from tests.moe.stability.moments import START

SHAPES = {
    "embed.weight": (9, 4),
    "layers.0.norm.weight": (4,),
    "layers.0.router.weight": (3, 4),
    "layers.0.experts.w_up": (3, 6, 4),
    "layers.0.experts.w_down": (3, 4, 5),
}
GROUPS = {name: next((g for g in ("router", "experts") if g in name), "dense") for name in SHAPES}
"""Group of each parameter."""

Tensors = dict[str, torch.Tensor]


class Holder(nn.Module):
    """Modules nested by the dots of a name."""

    def put(self, name: str, tensor: torch.Tensor) -> None:
        head, _, rest = name.partition(".")
        if not rest:
            self.register_parameter(head, nn.Parameter(tensor))
            return
        if not hasattr(self, head):
            self.add_module(head, Holder())
        child = getattr(self, head)
        assert isinstance(child, Holder)
        child.put(rest, tensor)


def drawn(seed: int, scale: float = 1.0) -> Tensors:
    """A normal tensor of each shape."""
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class Toy:
    """The parameters, an optimizer, and one technique that acts on the gradients given to ``clip``."""

    def __init__(self, clip: Config, optimizer: AdamwConfig | None = None) -> None:
        model = Holder()
        for name, tensor in drawn(0).items():
            model.put(name, tensor)
        self.parameters = ParameterSet(model, ALONE, dense_is_sharded=False)
        assert [p.name for p in self.parameters.all] == list(SHAPES)
        units = Units(self.parameters.all, ALONE)
        self.optimizer = AdamW(self.parameters.all, optimizer or AdamwConfig(), units)
        self.technique = CLIP[type(clip)](clip, ModelConfig(), ALONE)
        self.technique.before_training(self.parameters)

    def clip(self, gradients: Mapping[str, torch.Tensor]) -> tuple[Tensors, dict[str, float]]:
        """The clipped gradients, and what the technique reports."""
        for p in self.parameters.all:
            p.handle.grad = gradients[p.name].clone()
        norms = self.parameters.norms()
        figures = self.technique.on_gradients(
            self.parameters, GradientNorms(norms.pop("total"), norms), self.optimizer, START
        )
        return {p.name: p.gradient.clone() for p in self.parameters.all}, figures

    def step(self, gradients: Mapping[str, torch.Tensor], lr: float = 1e-2) -> dict[str, float]:
        """Clip and update; what the technique reports."""
        _, figures = self.clip(gradients)
        self.optimizer.step(lr * self.technique.lr_factor(START))
        return figures

    def weights(self) -> Tensors:
        return {p.name: p.local.clone() for p in self.parameters.all}


def norm_of(tensors: Sequence[torch.Tensor]) -> float:
    """L2 norm of all together."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def by_unit(gradients: Mapping[str, torch.Tensor]) -> dict[Any, torch.Tensor]:
    """Every tensor by name, every expert of a stack by name and number."""
    units: dict[Any, torch.Tensor] = {}
    for name, gradient in gradients.items():
        if GROUPS[name] == "experts":
            units |= {(name, e): gradient[e] for e in range(len(gradient))}
        else:
            units[name] = gradient
    return units


def assert_close(got: Mapping[Any, torch.Tensor], want: Mapping[Any, torch.Tensor], rtol: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name].double(), tensor.double(), rtol=rtol, atol=1e-9, msg=str(name))
