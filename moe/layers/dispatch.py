"""Tokens to the ranks that hold their experts, and back.

A token travels once to each rank that holds any of its experts, however many of them that rank holds, and one
combined vector comes back: four passes of D values for each (token, remote rank) pair and layer (dispatch and combine,
forward and backward). The naive scheme pays that for every (token, expert) pair.

Shape legend: T tokens of this rank, D model width, K experts per token, R rows sent, Q rows received, W ranks of the
expert-parallel group.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from moe.layers.experts import sum_rows
from moe.parallel import Ranks

# (rows [Q, D], local expert ids [Q, K] with -1 for experts elsewhere, gates [Q, K]) -> combined rows [Q, D]
RunExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class RowCodec(Protocol):
    """Another form in which rows [R, D] travel to their experts."""

    def round(self, x_RD: torch.Tensor) -> torch.Tensor:
        """The rows that will arrive, differentiable; asked for with one rank too, so that divisions agree."""

    def encode(self, x_RD: torch.Tensor) -> torch.Tensor:
        """Rounded rows as bytes, uint8 [R, B]."""

    def decode(self, bytes_RB: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Exactly the rows [R, width] that were encoded."""


def _exchange(rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], ranks: Ranks, kind: str) -> torch.Tensor:
    """All-to-all of row blocks inside the expert-parallel group; counts the bytes that leave this rank."""
    rows = rows.contiguous()
    received = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(received, rows, list(receive), list(send), group=ranks.ep_group)
    remote_rows = sum(send) - send[ranks.ep_rank]
    sent = remote_rows * rows[:1].numel() * rows.element_size() if rows.shape[0] else 0
    setattr(ranks.wire, kind, getattr(ranks.wire, kind) + sent)
    return received


class _ExchangeRows(torch.autograd.Function):
    """``_exchange`` whose gradient travels the same way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], ranks: Ranks, kind: str
    ) -> torch.Tensor:
        ctx.way_back = (receive, send, ranks, kind)
        return _exchange(rows, send, receive, ranks, kind)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _exchange(grads[0], *ctx.way_back), None, None, None, None


class _ExchangeEncodedRows(torch.autograd.Function):
    """``_ExchangeRows`` of rows that travel as bytes; their gradient travels back in its own dtype."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, codec: RowCodec, send: Sequence[int], receive: Sequence[int], ranks: Ranks
    ) -> torch.Tensor:
        ctx.way_back = (receive, send, ranks, "payload")
        received = _exchange(codec.encode(rows), send, receive, ranks, "payload")
        return codec.decode(received, rows.shape[1], rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _exchange(grads[0], *ctx.way_back), None, None, None, None


class _CopyRows(torch.autograd.Function):
    """``x[token_R]``; its gradient sums a token's rows in a fixed order."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, token_R: torch.Tensor, order_R: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(order_R, starts)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        order_R, starts = ctx.saved_tensors
        return sum_rows(grads[0].contiguous(), order_R, starts), None, None, None


class _SumRows(torch.autograd.Function):
    """The transpose of ``_CopyRows``: sum the rows that came back for each token."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: torch.Tensor, token_R: torch.Tensor, order_R: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(token_R)
        return sum_rows(rows_RD, order_R, starts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (token_R,) = ctx.saved_tensors
        return grads[0].index_select(0, token_R), None, None, None


def dispatch_combine(
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    gates_TK: torch.Tensor,
    experts_per_rank: int,
    run_experts: RunExperts,
    ranks: Ranks,
    codec: RowCodec | None = None,
) -> torch.Tensor:
    """Send each token to the ranks of its experts, run them there, return the gate-weighted sums [T, D].

    ``ids_TK`` are global expert ids, -1 for no expert, which sends nothing. With one rank this is ``run_experts``
    itself. Every rank of the group must call it the same number of times; a rank may send or receive no row at all.
    Rows travel to their experts as ``codec`` has them, back in their dtype.
    """
    if codec is not None:
        x_TD = codec.round(x_TD)
    if ranks.ep == 1:
        return run_experts(x_TD, ids_TK, gates_TK)
    # No expert has an owner beyond the last rank.
    owner_TK = (ids_TK // experts_per_rank).masked_fill(ids_TK < 0, ranks.ep)
    needed_WT = F.one_hot(owner_TK, ranks.ep + 1)[..., : ranks.ep].amax(dim=1).t()
    rank_R, token_R = needed_WT.nonzero(as_tuple=True)
    order_R = token_R.argsort(stable=True)
    starts = F.pad(needed_WT.sum(dim=0).cumsum(0), (1, 0))

    send_W = needed_WT.sum(dim=1)
    ones = [1] * ranks.ep
    receive_W = _exchange(send_W, ones, ones, ranks, "metadata")
    send, receive = send_W.tolist(), receive_W.tolist()

    elsewhere_RK = owner_TK[token_R] != rank_R.unsqueeze(1)
    local_RK = (ids_TK[token_R] % experts_per_rank).masked_fill(elsewhere_RK, -1).to(torch.int16)
    id_bytes = local_RK.view(torch.uint8)  # neither gloo nor NCCL carries int16
    gates_RK = gates_TK[token_R].masked_fill(elsewhere_RK, 0.0)
    x_RD = _CopyRows.apply(x_TD, token_R, order_R, starts)

    local_QK = _exchange(id_bytes, send, receive, ranks, "metadata").view(torch.int16).long()
    gates_QK = _ExchangeRows.apply(gates_RK, send, receive, ranks, "metadata")
    if codec is None:
        x_QD = _ExchangeRows.apply(x_RD, send, receive, ranks, "payload")
    else:
        x_QD = _ExchangeEncodedRows.apply(x_RD, codec, send, receive, ranks)
    y_QD = run_experts(x_QD, local_QK, gates_QK)
    y_RD = _ExchangeRows.apply(y_QD, receive, send, ranks, "payload")
    y_TD: torch.Tensor = _SumRows.apply(y_RD, token_R, order_R, starts)
    return y_TD
