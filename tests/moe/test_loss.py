import math

import pytest
import torch

from moe.batch import Batch
from moe.loss import counted_targets, cross_entropy_sum


def test_targets_are_the_tokens_ahead() -> None:
    ids = torch.arange(14).view(2, 7)
    assert counted_targets(Batch(ids), 5, 1).tolist() == [[1, 2, 3, 4, 5], [8, 9, 10, 11, 12]]
    assert counted_targets(Batch(ids), 5, 2).tolist() == [[2, 3, 4, 5, 6], [9, 10, 11, 12, 13]]


@pytest.mark.parametrize("shift", [1, 2])
def test_a_target_counts_if_all_tokens_up_to_it_are_real(shift: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (6, 12), generator=generator)
    real = torch.rand(6, 12, generator=generator) < 0.7
    found = counted_targets(Batch(ids, real), 10, shift).tolist()
    for row in range(6):
        for s in range(10):
            counts = all(real[row, s + ahead] for ahead in range(shift + 1))
            assert found[row][s] == (ids[row, s + shift] if counts else -100)


def test_the_sum_is_over_counted_targets_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator).bfloat16()
    targets = torch.tensor([[1, 2, -100, 0, 6], [-100, -100, 3, 3, 5]])
    expected = 0.0
    for row, target in zip(logits.double().flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True):
        if target != -100:
            expected += math.log(sum(map(math.exp, row))) - row[target]
    loss = cross_entropy_sum(logits, targets)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(cross_entropy_sum(logits, torch.full_like(targets, -100))) == 0.0
