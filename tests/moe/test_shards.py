"""Whole matrices of row shards: each on one rank, uneven shards and ranks without any row included."""

import pytest
import torch
from torch import nn

from moe.config.trainer import ParallelConfig
from moe.parallel import join
from moe.parameters import Parameter
from moe.shards import held_rows, on_whole_matrices
from tests.distributed import run_distributed

ROWS = [[2, 2, 1], [1, 1, 0], [3, 3, 2], [1, 0, 0], [2, 2, 2]]
"""Rows of five matrices on three ranks."""


def matrix(index: int) -> torch.Tensor:
    return torch.randn(sum(ROWS[index]), 2 + index, generator=torch.Generator().manual_seed(index))


def shards(rank: int) -> list[torch.Tensor]:
    return [matrix(index).split(rows)[rank] for index, rows in enumerate(ROWS)]


def mixed(index: int, whole: torch.Tensor) -> torch.Tensor:
    """Every row depends on the rows above and on which matrix it is."""
    return whole.cumsum(dim=0) * (index + 1)


def gathered(rank: int, world: int) -> tuple[list[list[int]], list[torch.Tensor], list[int]]:
    ranks = join(ParallelConfig(workers=world, device="cpu"))
    mine = shards(rank)
    rows = held_rows([Parameter(str(i), nn.Parameter(s), "sharded", "dense") for i, s in enumerate(mine)], ranks)
    done = []

    def function(index: int, whole: torch.Tensor) -> torch.Tensor:
        done.append(index)
        return mixed(index, whole)

    return rows, list(on_whole_matrices(iter(mine), rows, ranks, function)), done


def test_each_matrix_is_whole_on_one_rank_and_its_rows_come_back() -> None:
    for rank, (rows, results, done) in enumerate(run_distributed(gathered, 3)):
        assert rows == ROWS
        assert done == list(range(rank, 5, 3))
        for index, result in enumerate(results):
            torch.testing.assert_close(result, mixed(index, matrix(index)).split(ROWS[index])[rank], rtol=0, atol=0)


@pytest.mark.parametrize("held", [1, 0])
def test_one_process_holds_all_rows(held: int) -> None:
    ranks = join(ParallelConfig(workers=1, device="cpu"))
    parameters = [Parameter("a", nn.Parameter(torch.zeros(4, 2)), "replicated", "dense")][:held]
    assert held_rows(parameters, ranks) == [[4]][:held]
