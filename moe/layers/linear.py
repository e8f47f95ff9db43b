"""Matrix product with fp32 weights in the dtype of its input, or as other products do it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe.layers.grouped import Products


class _Multiply(torch.autograd.Function):
    """``x W^T`` of x [T, in] and W [out, in] by ``products``, which see one expert with all rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, products: Products) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.products = products
        return products.forward(x, weight.unsqueeze(0), [x.shape[0]])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        products: Products = ctx.products
        rows = [x.shape[0]]
        dx = products.input_gradient(grads[0], weight.unsqueeze(0), rows)
        return dx, products.weight_gradient(grads[0], x, rows).squeeze(0).to(weight.dtype), None


class Linear(nn.Module):
    """``y = x W^T`` without offset, computed in the dtype of ``x``; ``weight`` [out, in] stays fp32."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.products: Products | None = None
        """How to multiply where not plainly."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        if self.products is None:
            return F.linear(x, self.weight.to(x.dtype))
        y: torch.Tensor = _Multiply.apply(x.flatten(0, -2), self.weight, self.products)
        return y.view(*x.shape[:-1], -1)
