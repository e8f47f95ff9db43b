"""Statistics of whole tensors from what the ranks hold of them."""

from typing import Any

import pytest
import torch

from moe.units import Units
from tests.distributed import run_distributed
from tests.moe.divisions import DIVISIONS
from tests.moe.tiny import MTP, gradients, tiny_config, tiny_trainer


def statistics(rank: int, world: int, parallel: dict[str, Any]) -> Any:
    """Sums of absolutes, norms, maxima, sizes and scaled norms of a step's gradients; the whole gradients by name."""
    changes: dict[str, Any] = {"stability": {"clip": {"kind": "none"}}, "parallel": {"workers": world, **parallel}}
    trainer = tiny_trainer(tiny_config(MTP, changes))
    trainer.step()
    units = Units(trainer.parameters.all, trainer.ranks)
    local = [p.gradient for p in trainer.parameters.all]
    doubled = [g.clone() for g in local]
    torch._foreach_mul_(doubled, units.shares(2 * units.norms(local), doubled))
    norms = units.norms(doubled) / units.norms(local)
    assert len(units) == len(norms)
    return (
        units.sums(g.abs() for g in local),
        units.norms(local),
        units.maxima(local),
        units.sizes_U,
        norms,
    ), gradients(trainer)


@pytest.mark.parametrize(
    ("world", "division"), [(1, "replicas"), (2, "replicas"), (2, "ep2"), (2, "sharded"), (2, "ep2-sharded")]
)
def test_units_are_whole_tensors_and_single_experts_whatever_holds_them(world: int, division: str) -> None:
    results = run_distributed(statistics, world, DIVISIONS[division])
    for got, whole in results:
        units: list[torch.Tensor] = []
        for name, gradient in whole.items():
            units += list(gradient.double()) if ".experts." in name else [gradient.double()]
        expected = (
            [float(unit.abs().sum()) for unit in units],
            [float(unit.square().sum().sqrt()) for unit in units],
            [float(unit.abs().max()) for unit in units],
            [unit.numel() for unit in units],
            [2 * float(unit.square().sum().sqrt()) for unit in units],
        )
        assert len(units) == 3 * 2 * 8 + sum(".experts." not in name for name in whole)
        for values, wanted in zip(got, expected, strict=True):
            assert values.dtype == torch.float64
            assert values.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-9)
        assert all(torch.equal(a, b) for a, b in zip(got, results[0][0], strict=True)), "ranks differ"
