import pytest
import torch
from torch import nn

from moe import parameters
from moe.config.trainer import ParallelConfig
from moe.parallel import join
from moe.parameters import ParameterSet
from tests.distributed import run_distributed

SHAPES = [(3, 4), (5,), (1, 1), (7, 2), (2, 2, 2)]


def gradient(index: int, rank: int) -> torch.Tensor:
    return torch.randn(SHAPES[index], generator=torch.Generator().manual_seed(10 * index + rank))


def reduced(rank: int, world: int, bucket_bytes: int) -> list[torch.Tensor]:
    parameters._BUCKET_BYTES = bucket_bytes
    model = nn.ParameterList(torch.zeros(shape) for shape in SHAPES)
    for index, parameter in enumerate(model):
        # The last has a gradient on one rank alone, as a parameter that the other ranks' tokens did not reach.
        if index < len(SHAPES) - 1 or rank == 1:
            parameter.grad = gradient(index, rank)
    found = ParameterSet(model, join(ParallelConfig(workers=world, device="cpu")), dense_is_sharded=False)
    found.reduce_gradients()
    return [parameter.gradient for parameter in found.all]


@pytest.mark.parametrize("bucket_bytes", [1, 50, 1 << 20])
def test_gradients_are_summed_over_ranks_whatever_the_size_of_a_bucket(bucket_bytes: int) -> None:
    for found in run_distributed(reduced, 2, bucket_bytes):
        for index, got in enumerate(found):
            last = index == len(SHAPES) - 1
            expected = gradient(index, 1) + (0 if last else gradient(index, 0))
            torch.testing.assert_close(got, expected)
