"""The routed experts that one rank holds: gated FFNs on rows sorted by expert, weighted and summed per row.

Shape legend: R rows (tokens that need an expert of this rank), K choices per row (-1 where the expert lives on
another rank), P chosen (row, expert) pairs sorted by expert, D model width, F expert width, E experts on this rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe.layers.activation import Activation
from moe.layers.grouped import PlainProducts, Products


@dataclass(frozen=True)
class ExpertPlan:
    """Which row goes to which expert, worked out once and used by the forward and the backward pass.

    ``pair_P`` are positions in the flattened [R*K] choices sorted by expert, ``row_P`` their rows; ``ends`` where each
    expert's pairs end; ``order_P`` lists the pairs row by row and ``row_starts`` [R+1] where each row's begin.
    """

    pair_P: torch.Tensor
    row_P: torch.Tensor
    ends: list[int]
    order_P: torch.Tensor
    row_starts: torch.Tensor


def plan_experts(ids_RK: torch.Tensor, num_experts: int) -> ExpertPlan:
    """Sort choices by expert; ``ids_RK`` are ids on this rank, -1 for a choice that another rank serves."""
    rows, k = ids_RK.shape
    flat = ids_RK.flatten()
    # Narrow keys: a stable sort of uint8 is about five times faster than one of int64.
    key_dtype = torch.uint8 if num_experts < 255 else torch.int32
    keys = torch.where(flat < 0, num_experts, flat).to(key_dtype)
    sorted_to_flat = keys.argsort(stable=True)
    counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts]
    ends = counts.cumsum(0).tolist()
    pair_P = sorted_to_flat[: ends[-1]]
    flat_to_sorted = torch.empty_like(sorted_to_flat)
    flat_to_sorted[sorted_to_flat] = torch.arange(flat.numel(), device=flat.device)
    held = flat >= 0
    row_starts = F.pad(held.view(rows, k).sum(dim=1).cumsum(0), (1, 0))
    return ExpertPlan(pair_P, pair_P // k, ends, flat_to_sorted[held], row_starts)


def sum_rows(rows_PD: torch.Tensor, order: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Sum consecutive groups of ``rows_PD[order]``; group i is ``order[starts[i]:starts[i+1]]``.

    An embedding bag does this in one pass without writing the gathered rows, and, unlike ``index_add``, in a fixed
    order (1.2 against 4.3 ms for 32k rows of 512).
    """
    if order.numel() == 0:
        return rows_PD.new_zeros(starts.numel() - 1, rows_PD.shape[1])
    return F.embedding_bag(order, rows_PD, starts, mode="sum", include_last_offset=True)


class _GroupedFeedForward(torch.autograd.Function):
    """Gather rows, up-project, activate, weight by the gate, down-project, sum per row.

    The gate multiplies the activation, before the down-projection: the combine is then a plain sum, no expert output is
    kept, and the gate's gradient is a dot product over F instead of D. Backward gathers its rows anew rather
    than keeping them; kept are x, the pre-activation and the gates.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: torch.Tensor,
        gates_RK: torch.Tensor,
        w_up_E2FD: torch.Tensor,
        w_down_EDF: torch.Tensor,
        plan: ExpertPlan,
        activation: Activation,
        up: Products,
        down: Products,
    ) -> torch.Tensor:
        dtype = x_RD.dtype
        gates_P1 = gates_RK.flatten()[plan.pair_P].to(dtype).unsqueeze(1)
        h_P2F = up.forward(x_RD.index_select(0, plan.row_P), w_up_E2FD, plan.ends)
        y_PD = down.forward(activation.forward(h_P2F).mul_(gates_P1), w_down_EDF, plan.ends)
        ctx.save_for_backward(x_RD, gates_P1, h_P2F, w_up_E2FD, w_down_EDF)
        ctx.plan, ctx.activation, ctx.gates_like, ctx.products = plan, activation, gates_RK, (up, down)
        return sum_rows(y_PD, plan.order_P, plan.row_starts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_RD, gates_P1, h_P2F, w_up_E2FD, w_down_EDF = ctx.saved_tensors
        plan: ExpertPlan = ctx.plan
        activation: Activation = ctx.activation
        up, down = ctx.products
        dy_PD = grads[0].index_select(0, plan.row_P)
        dweighted_PF = down.input_gradient(dy_PD, w_down_EDF, plan.ends)
        dh_P2F, activated_PF = activation.backward(h_P2F, dweighted_PF * gates_P1)
        dgates_P = torch.linalg.vecdot(dweighted_PF, activated_PF)
        dw_down = down.weight_gradient(dy_PD, activated_PF.mul_(gates_P1), plan.ends)
        dw_up = up.weight_gradient(dh_P2F, x_RD.index_select(0, plan.row_P), plan.ends)
        dx_PD = up.input_gradient(dh_P2F, w_up_E2FD, plan.ends)
        dgates_RK = torch.zeros_like(ctx.gates_like)
        dgates_RK.view(-1)[plan.pair_P] = dgates_P.to(dgates_RK.dtype)
        dx_RD = sum_rows(dx_PD, plan.order_P, plan.row_starts)
        return dx_RD, dgates_RK, dw_up.to(w_up_E2FD.dtype), dw_down.to(w_down_EDF.dtype), None, None, None, None


class Experts(nn.Module):
    """E gated experts; ``w_up`` [E, 2F, D] stacks each gate over its up-projection, ``w_down`` is [E, D, F]."""

    def __init__(self, num_experts: int, hidden_size: int, expert_size: int, activation: Activation) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.activation = activation
        self.up_products: Products = PlainProducts()
        self.down_products: Products = PlainProducts()
        self.w_up = nn.Parameter(torch.empty(num_experts, 2 * expert_size, hidden_size))
        self.w_down = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))

    def activations(self, x_RD: torch.Tensor, ids_RK: torch.Tensor) -> torch.Tensor:
        """What the chosen experts' down-projections read, before gates: [P, F], sorted by expert. Not for training."""
        plan = plan_experts(ids_RK, self.num_experts)
        rows_PD = x_RD.index_select(0, plan.row_P)
        return self.activation.forward(self.up_products.forward(rows_PD, self.w_up, plan.ends))

    def forward(self, x_RD: torch.Tensor, ids_RK: torch.Tensor, gates_RK: torch.Tensor) -> torch.Tensor:
        """Sum over each row's experts here of gate times output -> [R, D]; ids are local, -1 means elsewhere."""
        plan = plan_experts(ids_RK, self.num_experts)
        y: torch.Tensor = _GroupedFeedForward.apply(
            x_RD, gates_RK, self.w_up, self.w_down, plan, self.activation, self.up_products, self.down_products
        )
        return y
