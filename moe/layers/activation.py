"""SwiGLU's activation (arXiv 2002.05202), shared by dense layers, shared experts and routed experts.

Shape legend: T rows, F hidden width; h [T, 2F] holds the gate's pre-activation, then the up-projection.
"""

from typing import Any

import torch
import torch.nn.functional as F


def swiglu(h_T2F: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` -> [T, F], outside of autograd."""
    gate, up = h_T2F.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward(h_T2F: torch.Tensor, dactivated_TF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient with respect to h, and the activation itself, which costs one more product: (dh [T, 2F], [T, F]).

    Overwrites ``dactivated_TF``. Written with few passes over memory and without joining halves, which on a CPU took as
    long as a quarter of the layer's matrix products.
    """
    gate, up = h_T2F.chunk(2, dim=-1)
    dh_T2F = torch.empty_like(h_T2F)
    dgate, dup = dh_T2F.chunk(2, dim=-1)
    silu = F.silu(gate)
    torch.mul(dactivated_TF, silu, out=dup)
    torch.ops.aten.silu_backward.grad_input(dactivated_TF.mul_(up), gate, grad_input=dgate)
    return dh_T2F, silu.mul_(up)


class SwiGLUActivation(torch.autograd.Function):
    """``swiglu`` for autograd; keeps h alone."""

    @staticmethod
    def forward(ctx: Any, h_T2F: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h_T2F)
        return swiglu(h_T2F)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (h_T2F,) = ctx.saved_tensors
        # The incoming gradient may be shared with other nodes of the graph, so it is not overwritten.
        return swiglu_backward(h_T2F, grads[0].clone())[0]
