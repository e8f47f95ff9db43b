"""Experts by token id: the first MoE layers of DeepSeek-V4 look a token's experts up in a fixed table.

What the tables hold is not published. Here K distinct experts are drawn for every token id by a hash of (layer, token
id, draw): any set of K experts is as likely as any other, so over a vocabulary each expert stands in K V / E entries on
average, give or take the root of that. Load follows the frequency of tokens, which no table balances.

Shape legend: T tokens, V vocabulary, E routed experts, K experts per token.
"""

import torch
from torch import nn

# splitmix64 (Steele, Lea and Flood, 2014) as signed numbers; torch's int64 wraps around as unsigned numbers would.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's output for the state ``x``, int64."""
    for shift, factor in _MIX:
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """``x >> bits`` with zeros coming in from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash_table(vocab_size: int, num_experts: int, top_k: int, layer: int) -> torch.Tensor:
    """Expert ids of every token id, int64 [V, K], distinct and ascending in each row; a function of its arguments.

    Draw d gives a number below ``E - K + d + 1``, or ``E - K + d`` where an earlier draw gave that number (Floyd's
    sampling, CACM 30(9), 1987): K draws for any number of experts.
    """
    token_V = torch.arange(vocab_size, dtype=torch.int64)
    table_VK = torch.empty(vocab_size, 0, dtype=torch.int64)
    for draw, last in enumerate(range(num_experts - top_k, num_experts)):
        state_V = _mixed(token_V * _GOLDEN + layer) + draw
        number_V = _shifted(_mixed(state_V * _GOLDEN), 1) % (last + 1)
        taken_V = (table_VK == number_V.unsqueeze(1)).any(dim=1)
        table_VK = torch.cat((table_VK, number_V.masked_fill(taken_V, last).unsqueeze(1)), dim=1)
    return table_VK.sort(dim=1).values


class HashChoice(nn.Module):
    """The table of one layer."""

    experts_VK: torch.Tensor

    def __init__(self, vocab_size: int, num_experts: int, top_k: int, layer: int) -> None:
        super().__init__()
        # Not persistent: it follows from the config, so checkpoints need not hold it.
        self.register_buffer("experts_VK", hash_table(vocab_size, num_experts, top_k, layer), persistent=False)

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Token ids [T] -> expert ids [T, K]."""
        return self.experts_VK[ids_T]
