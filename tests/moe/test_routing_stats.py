import pytest
import torch

from moe.routing_stats import max_violation, real_expert_figures


def test_max_violation_is_the_excess_of_the_busiest_expert_over_the_mean() -> None:
    counts_ME = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [1, 2, 3, 6], [0, 0, 0, 0]])
    assert max_violation(counts_ME).tolist() == pytest.approx([0.0, 3.0, 1.0, 0.0])
    assert max_violation(counts_ME).dtype == torch.float64


def test_figures_of_real_experts_are_mean_deviation_and_share_without_any() -> None:
    numbers = [0, 3, 1, 0, 4]
    sums = torch.tensor([sum(numbers), sum(n * n for n in numbers), 2], dtype=torch.float64)
    found = real_expert_figures(sums, 5.0)
    assert list(found.values()) == pytest.approx([1.6, (sum((n - 1.6) ** 2 for n in numbers) / 5) ** 0.5, 0.4])
    assert real_expert_figures(torch.zeros(3, dtype=torch.float64), 0.0)["moe/real_experts_std"] == 0.0
