import pytest
import torch

from moe.routing_stats import max_violation


def test_max_violation_is_the_excess_of_the_busiest_expert_over_the_mean() -> None:
    counts_ME = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [1, 2, 3, 6], [0, 0, 0, 0]])
    assert max_violation(counts_ME).tolist() == pytest.approx([0.0, 3.0, 1.0, 0.0])
    assert max_violation(counts_ME).dtype == torch.float64
