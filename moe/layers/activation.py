"""Gated activations (arXiv 2002.05202), shared by dense layers, shared experts and routed experts.

Shape legend: T rows, F hidden width; h [T, 2F] holds the gate's pre-activation, then the up-projection.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F

from moe.config.activation import ActivationConfig, SituGluConfig, SwigluClampConfig, SwigluConfig
from moe.config.base import Config


class Activation(Protocol):
    """A gated activation and its derivative, both outside of autograd."""

    def forward(self, h_T2F: torch.Tensor) -> torch.Tensor:
        """h [T, 2F] -> [T, F], in the dtype of h, with storage of its own."""

    def backward(self, h_T2F: torch.Tensor, dactivated_TF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient with respect to h, and the activation itself, which costs one more product: (dh [T, 2F], [T, F]).

        Overwrites ``dactivated_TF``.
        """


@dataclass(frozen=True)
class Swiglu:
    """``silu(gate) * up``.

    Written with few passes over memory and without joining halves, which on a CPU took as long as a quarter of the
    layer's matrix products.
    """

    config: SwigluConfig

    def forward(self, h_T2F: torch.Tensor) -> torch.Tensor:
        gate, up = h_T2F.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def backward(self, h_T2F: torch.Tensor, dactivated_TF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = h_T2F.chunk(2, dim=-1)
        dh_T2F = torch.empty_like(h_T2F)
        dgate, dup = dh_T2F.chunk(2, dim=-1)
        silu = F.silu(gate)
        torch.mul(dactivated_TF, silu, out=dup)
        torch.ops.aten.silu_backward.grad_input(dactivated_TF.mul_(up), gate, grad_input=dgate)
        return dh_T2F, silu.mul_(up)


@dataclass(frozen=True)
class SwigluClamp:
    """SwiGLU of ``min(gate, limit)`` and ``clip(up, -limit, limit)``: SwiGLU after a clamp, forward and backward.

    A coordinate exactly at the limit is not clamped and keeps its gradient, as with ``torch.clamp``.
    """

    config: SwigluClampConfig
    swiglu = Swiglu(SwigluConfig())

    def forward(self, h_T2F: torch.Tensor) -> torch.Tensor:
        return self.swiglu.forward(self._clamped(h_T2F))

    def backward(self, h_T2F: torch.Tensor, dactivated_TF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        clamped_T2F = self._clamped(h_T2F)
        dh_T2F, activated_TF = self.swiglu.backward(clamped_T2F, dactivated_TF)
        return dh_T2F.masked_fill_(clamped_T2F != h_T2F, 0.0), activated_TF

    def _clamped(self, h_T2F: torch.Tensor) -> torch.Tensor:
        limit = self.config.limit
        clamped_T2F = h_T2F.clamp(max=limit)  # the gate has no lower bound: silu is nearly 0 there
        clamped_T2F.chunk(2, dim=-1)[1].clamp_(min=-limit)
        return clamped_T2F


@dataclass(frozen=True)
class SituGlu:
    """``a tanh(gate / a) sigmoid(gate) * b tanh(up / b)``, computed in at least fp32.

    Its dozen operations would each round to bf16 otherwise; torch's silu is one operation and computes in fp32 too.
    """

    config: SituGluConfig

    def forward(self, h_T2F: torch.Tensor) -> torch.Tensor:
        tanh_gate, sigmoid, tanh_up = self._parts(h_T2F)
        return self._activated(tanh_gate, sigmoid, tanh_up).to(h_T2F.dtype)

    def backward(self, h_T2F: torch.Tensor, dactivated_TF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.config.gate_bound, self.config.up_bound
        tanh_gate, sigmoid, tanh_up = self._parts(h_T2F)
        # d/dgate: (1 - tanh^2) sigmoid + a tanh sigmoid (1 - sigmoid); d/dup: 1 - tanh^2.
        slope_gate = (1 - tanh_gate.square() + a * tanh_gate * (1 - sigmoid)).mul_(sigmoid)
        slope_up = 1 - tanh_up.square()
        dh_T2F = torch.empty_like(h_T2F)
        dgate, dup = dh_T2F.chunk(2, dim=-1)
        dgate.copy_(slope_gate.mul_(tanh_up).mul_(b).mul_(dactivated_TF))
        dup.copy_(slope_up.mul_(tanh_gate).mul_(sigmoid).mul_(a).mul_(dactivated_TF))
        return dh_T2F, self._activated(tanh_gate, sigmoid, tanh_up).to(h_T2F.dtype)

    def _parts(self, h_T2F: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = h_T2F if h_T2F.dtype == torch.float64 else h_T2F.float()
        gate, up = wide.chunk(2, dim=-1)
        return gate.div(self.config.gate_bound).tanh_(), gate.sigmoid(), up.div(self.config.up_bound).tanh_()

    def _activated(self, tanh_gate: torch.Tensor, sigmoid: torch.Tensor, tanh_up: torch.Tensor) -> torch.Tensor:
        """The activation; overwrites ``tanh_gate``."""
        return tanh_gate.mul_(sigmoid).mul_(tanh_up).mul_(self.config.gate_bound * self.config.up_bound)


ACTIVATIONS: dict[type[Config], Callable[[Any], Activation]] = {
    SwigluConfig: Swiglu,
    SwigluClampConfig: SwigluClamp,
    SituGluConfig: SituGlu,
}


def build_activation(config: ActivationConfig) -> Activation:
    """The activation that ``model.activation.kind`` names."""
    return ACTIVATIONS[type(config)](config)


class Activate(torch.autograd.Function):
    """An activation for autograd; keeps h alone."""

    @staticmethod
    def forward(ctx: Any, h_T2F: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(h_T2F)
        ctx.activation = activation
        return activation.forward(h_T2F)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (h_T2F,) = ctx.saved_tensors
        # The incoming gradient may be shared with other nodes of the graph, so it is not overwritten.
        return cast(Activation, ctx.activation).backward(h_T2F, grads[0].clone())[0], None
