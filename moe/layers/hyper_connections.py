"""Hyper-connections: several residual streams that sub-layers read from, write to and mix.

``X' = B X + C F(A X)`` for a sub-layer F and streams X (arXiv 2409.19606). Manifold-constrained (arXiv 2512.24880;
DeepSeek-V4 report, section 2.2): A = sigmoid, C = 2 sigmoid, B = Sinkhorn(exp) of what is read off the streams.

A, B and C are computed in fp32 and applied in fp32, and the streams are rounded to the compute dtype once per
sub-layer: rows of a B in bf16 would be off by up to 0.4 %, which compounds over the depth.

At the start every stream is a copy of the embedding, A adds up to 1, C is 1 and the rows of B add up to 1: but for the
small part that depends on the token, the model is the plain residual one. The initial values of the paper are
unconfirmed; those here are this project's. A prefers one stream, another one for each sub-layer in turn (as arXiv
2409.19606 does), since sub-layers that all read the same mean would leave the streams the same gradients.

Shape legend: B sequences, S positions, T = B*S tokens, N streams, D model width, M numbers read off the streams.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from moe.config.residual import HyperConfig, MhcConfig

# Initially of A's sum for the preferred stream, and of B's rows and columns for the diagonal.
_PREFERRED = 0.9
_KEPT = 0.98


def _wide(x: torch.Tensor) -> torch.Tensor:
    """At least fp32."""
    return x if x.dtype == torch.float64 else x.float()


class _Sinkhorn(torch.autograd.Function):
    """Keeps every half round and goes back through each in three passes, in a layout whose last axis is the tokens."""

    @staticmethod
    def forward(ctx: Any, logits_NNT: torch.Tensor, rounds: int) -> torch.Tensor:
        tiny = torch.finfo(logits_NNT.dtype).tiny
        b_NNT = logits_NNT.softmax(dim=0)
        kept = [b_NNT]
        for half in range(1, 2 * rounds):
            sums = b_NNT.sum(dim=half % 2, keepdim=True)
            inverse = sums.reciprocal().masked_fill_(sums < tiny, 0.0)
            b_NNT = b_NNT * inverse
            kept += [inverse, b_NNT]
        ctx.save_for_backward(*kept)
        return b_NNT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        first, *kept = ctx.saved_tensors
        grad_NNT = grads[0].contiguous()
        for index in range(len(kept) - 2, -1, -2):
            inverse, b_NNT = kept[index], kept[index + 1]
            dim = (index // 2 + 1) % 2
            grad_NNT = (grad_NNT - (grad_NNT * b_NNT).sum(dim=dim, keepdim=True)).mul_(inverse)
        return (grad_NNT - (grad_NNT * first).sum(dim=0, keepdim=True)).mul_(first), None


def sinkhorn(logits_NNT: torch.Tensor, rounds: int) -> torch.Tensor:
    """``exp(logits)`` after ``rounds`` of dividing columns, then rows by their sums; the same shape.

    The axes are (to, from, T): a row is what one stream receives and adds up over axis 1. Rows end exact, columns as
    near as the rounds bring them, which is the less the nearer the result is to a permutation. What underflows, 87
    below its column's largest logit, stays 0, without a gradient.
    """
    b_NNT: torch.Tensor = _Sinkhorn.apply(logits_NNT, rounds)
    return b_NNT


class StreamReader(nn.Module):
    """``scale * (RMSNorm(vec X) W^T) + offset`` for parts of M numbers, each part with a scale of its own.

    The norm has no gain. It divides what the product gives rather than what it reads, which saves a pass over X.
    """

    def __init__(self, streams: int, size: int, eps: float, parts: list[torch.Tensor], alpha: float) -> None:
        """``parts`` are the initial offsets; ``alpha`` is the initial scale of all."""
        super().__init__()
        self.eps, self.sizes = eps, [len(part) for part in parts]
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), streams * size))
        self.offset = nn.Parameter(torch.empty(sum(self.sizes)))
        self.scale = nn.Parameter(torch.empty(len(parts)))
        self._start = {"offset": torch.cat(parts), "scale": torch.full((len(parts),), alpha)}

    def initial_values(self) -> dict[str, torch.Tensor]:
        """What does not start random."""
        return self._start

    def forward(self, x_TND: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Streams in at least fp32 -> one tensor [size of the part, T] for each part."""
        x_TX = x_TND.flatten(1)
        norm_T = (x_TX.square().mean(dim=-1) + self.eps).rsqrt()
        read_MT = (self.weight @ x_TX.t()) * norm_T
        parts = zip(read_MT.split(self.sizes), self.offset.split(self.sizes), self.scale, strict=True)
        return tuple(scale * read + offset.unsqueeze(1) for read, offset, scale in parts)


class HyperConnection(nn.Module):
    """The residual around one sub-layer, for ``model.residual.kind`` hyper and mhc."""

    def __init__(self, config: HyperConfig | MhcConfig, size: int, eps: float, sub_layer: int) -> None:
        """``sub_layer`` counts from 0 through the model."""
        super().__init__()
        self.config = config
        n = config.streams
        a_N = torch.full((n,), (1 - _PREFERRED) / (n - 1))
        a_N[sub_layer % n] = _PREFERRED
        b_NN = torch.full((n, n), (1 - _KEPT) / (n - 1)).fill_diagonal_(_KEPT)
        c_N = torch.ones(n)
        if isinstance(config, MhcConfig):
            a_N, b_NN, c_N = a_N.logit(), b_NN.log(), (c_N / 2).logit()
        self.connection = StreamReader(n, size, eps, [a_N, c_N, b_NN.flatten()], config.alpha)

    def mappings(self, x_TND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A [N, T], B [N, N, T] (to, from) and C [N, T] for streams [T, N, D], in at least fp32."""
        a_NT, c_NT, b_XT = self.connection(_wide(x_TND))
        b_NNT = b_XT.unflatten(0, (self.config.streams, -1))
        if isinstance(self.config, MhcConfig):
            return a_NT.sigmoid(), sinkhorn(b_NNT, self.config.sinkhorn_rounds), 2 * c_NT.sigmoid()
        return a_NT, b_NNT, c_NT

    def forward(self, x_BSND: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """Streams [B, S, N, D] -> what the sub-layer reads [B, S, D], and what takes its output to the next streams."""
        x_TND = _wide(x_BSND.flatten(0, 1))
        a_NT, b_NNT, c_NT = self.mappings(x_TND)
        # One product for what is read and what is kept, so that the streams are read once.
        mixed_TXD = torch.cat((a_NT.unsqueeze(0), b_NNT)).permute(2, 0, 1).contiguous() @ x_TND
        read_T1D, kept_TND = mixed_TXD.split([1, self.config.streams], dim=1)
        read_BSD = read_T1D.reshape(*x_BSND.shape[:2], -1).to(x_BSND.dtype)
        return read_BSD, partial(self._write, kept_TND, c_NT)

    @staticmethod
    def _write(kept_TND: torch.Tensor, c_NT: torch.Tensor, y_BSD: torch.Tensor) -> torch.Tensor:
        kept_BSND, c_BSN1 = (x.unflatten(0, y_BSD.shape[:2]) for x in (kept_TND, c_NT.t().unsqueeze(-1)))
        # The result is no view: a block returns it, and FSDP hangs its hooks on what a block returns.
        return torch.addcmul(kept_BSND, c_BSN1, _wide(y_BSD).unsqueeze(2)).to(y_BSD.dtype)


class Collapse(nn.Module):
    """Adds the streams up with weights ``sigmoid(scale * (RMSNorm(vec X) W^T) + offset)``, as DeepSeek-V4's head does.

    (As Hugging Face's transformers has it.) The weights start at 1 / N. The control has the same, since nothing
    compounds here.
    """

    def __init__(self, config: HyperConfig | MhcConfig, size: int, eps: float) -> None:
        super().__init__()
        start_N = torch.full((config.streams,), -math.log(config.streams - 1))
        self.connection = StreamReader(config.streams, size, eps, [start_N], config.alpha)

    def forward(self, x_BSND: torch.Tensor) -> torch.Tensor:
        """[B, S, N, D] -> [B, S, D]."""
        x_TND = _wide(x_BSND.flatten(0, 1))
        (logits_NT,) = self.connection(x_TND)
        y_T1D: torch.Tensor = logits_NT.sigmoid().t().contiguous().unsqueeze(1) @ x_TND
        return y_T1D.view(*x_BSND.shape[:2], -1).to(x_BSND.dtype)
