"""The largest attention logits of a forward, which the fused kernel does not give away.

Shape legend: B sequences, S positions, H heads, K query-key width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe.model import Block

# Logits that exist at a time: 64 MB of fp32.
_AT_A_TIME = 1 << 24


def watch_logits(
    blocks: Sequence[Block], see: Callable[[int, torch.Tensor], None], when: Callable[[], bool] = lambda: True
) -> list[RemovableHandle]:
    """Call ``see(number of the block, largest logit of each head [H])`` in every forward of a block for which ``when``.

    Only real queries count. Takes the products of queries with keys once more, outside autograd.
    """
    return [handle for number, block in enumerate(blocks) for handle in _watch_block(block, number, see, when)]


def _watch_block(
    block: Block, number: int, see: Callable[[int, torch.Tensor], None], when: Callable[[], bool]
) -> list[RemovableHandle]:
    real_BS: torch.Tensor | None = None

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal real_BS
        real_BS = args[1].real_BS

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if when():
            q_BHSK, k_BHSK, _, mask_B1SS = args
            see(number, largest_logits(q_BHSK, k_BHSK, mask_B1SS, real_BS))

    return [block.register_forward_pre_hook(enter), block.attention.attend.register_forward_hook(after)]


@torch.no_grad()
def largest_logits(
    q_BHSK: torch.Tensor, k_BHSK: torch.Tensor, mask_B1SS: torch.Tensor | None, real_BS: torch.Tensor | None
) -> torch.Tensor:
    """The largest product of a real query with a key that it attends to, after the softmax scale: [H], fp32.

    Without a mask, causal; minus infinity where there is no real query. A mask may hide keys that a causal one shows,
    and must show none that comes later.
    """
    heads, positions, width = q_BHSK.shape[1:]
    sequences = max(1, _AT_A_TIME // (heads * positions * positions))
    rows = max(1, _AT_A_TIME // (min(sequences, len(q_BHSK)) * heads * positions))
    largest_H = torch.full((heads,), float("-inf"), device=q_BHSK.device)
    for first in range(0, len(q_BHSK), sequences):
        part = slice(first, first + sequences)
        for start in range(0, positions, rows):
            end = min(start + rows, positions)
            allowed = _allowed(mask_B1SS, real_BS, part, start, end, q_BHSK.device)
            logits = q_BHSK[part, :, start:end].float() @ k_BHSK[part, :, :end].float().mT
            largest_H = largest_H.maximum(logits.masked_fill_(~allowed, float("-inf")).amax(dim=(0, 2, 3)))
    return largest_H.mul_(width**-0.5)


def _allowed(
    mask_B1SS: torch.Tensor | None,
    real_BS: torch.Tensor | None,
    part: slice,
    start: int,
    end: int,
    device: torch.device,
) -> torch.Tensor:
    """Which logits count between queries ``start`` to ``end`` of some sequences and the keys before ``end``."""
    if mask_B1SS is None:
        allowed = torch.arange(start, end, device=device).unsqueeze(1) >= torch.arange(end, device=device)
    else:
        allowed = mask_B1SS[part, :, start:end, :end]
    return allowed if real_BS is None else allowed & real_BS[part, None, start:end, None]
