"""Row shards of parameters: which rows each rank holds, and whole matrices made of them, each on one rank.

Shape legend: W ranks, P parameters.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist

from moe.parallel import Ranks
from moe.parameters import Parameter


def held_rows(parameters: Sequence[Parameter], ranks: Ranks) -> list[list[int]]:
    """Rows of each parameter (dimension 0) that each rank holds: [P][W], in the order of the ranks. Collective.

    The ranks' rows of a sharded parameter follow each other; of any other, every rank has all that its group has.
    """
    if not parameters:
        return []
    rows_PW = torch.zeros(len(parameters), ranks.world, dtype=torch.int64, device=ranks.device)
    rows_PW[:, ranks.rank] = torch.tensor([p.local.shape[0] for p in parameters], dtype=torch.int64)
    held: list[list[int]] = ranks.sum_over_world(rows_PW).tolist()
    return held


def on_whole_matrices(
    shards: Iterator[torch.Tensor],
    rows_PW: Sequence[Sequence[int]],
    ranks: Ranks,
    function: Callable[[int, torch.Tensor], torch.Tensor],
) -> Iterator[torch.Tensor]:
    """This rank's rows of ``function(index, whole matrix)`` for each of its ``shards``, in order. Collective.

    A whole matrix is put together on one rank, the first on rank 0, the second on rank 1 and so on, so that as many are
    worked on at once as there are ranks; ``function`` must keep its shape. Two exchanges per round.
    """
    for first in range(0, len(rows_PW), ranks.world):
        round_rows = rows_PW[first : first + ranks.world]
        round_shards = [next(shards) for _ in round_rows]
        yield from _one_round(round_shards, round_rows, ranks, partial(function, first + ranks.rank))


def _one_round(
    shards: list[torch.Tensor],
    rows_PW: Sequence[Sequence[int]],
    ranks: Ranks,
    function: Callable[[torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    """``on_whole_matrices`` of at most one matrix per rank."""
    out = [shard.numel() for shard in shards] + [0] * (ranks.world - len(shards))
    mine = ranks.rank < len(shards)
    columns = shards[ranks.rank].shape[1] if mine else 0
    arriving = [rows * columns for rows in rows_PW[ranks.rank]] if mine else [0] * ranks.world
    sent = torch.cat([shard.flatten() for shard in shards])
    whole = sent.new_empty(sum(arriving))
    dist.all_to_all_single(whole, sent, arriving, out)
    if mine:
        whole = function(whole.view(-1, columns)).flatten()
    back = torch.empty_like(sent)
    dist.all_to_all_single(back, whole, out, arriving)
    return [part.view_as(shard) for part, shard in zip(back.split(out[: len(shards)]), shards, strict=True)]
