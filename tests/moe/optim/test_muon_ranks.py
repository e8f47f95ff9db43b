"""Muon on any division of the ranks, over a resume and over a refused step."""

import functools
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.moe.divisions import (
    DIVISIONS,
    Cases,
    Run,
    Tolerance,
    assert_same_training,
    by_corner,
    reference,
    refused,
    resumed,
    runs_of,
)

# Newton-Schulz lifts what rounding leaves in small singular directions by up to 2e4: with a rate of 5e-3 weights differ
# by 8e-6 after five steps, with this one by less than half of it.
MUON: dict[str, Any] = {"kind": "muon", "lr": 2e-3, "eps": 1e-3}
BF16 = "plain attention, bf16 moments"
CASES: Cases = {
    "muon": [{"optimizer": MUON}],
    BF16: [
        {
            "optimizer": {**MUON, "moments": "bf16"},
            "model": {"attention": {"kind": "mha", "num_heads": 2, "head_dim": 6}},
        }
    ],
}
# A moment next to a tie rounds the other way where a sum's last bit differs. Measured at a rate of 5e-3: weights 1e-4,
# moments 3e-4.
TOLERANCES = {BF16: Tolerance(weights=2e-4, moments=4e-3)}


@functools.cache
def one_process() -> dict[str, Run]:
    return reference(CASES)


@by_corner
def test_two_ranks_update_as_one_process_does(division: str) -> None:
    assert_same_training(runs_of(CASES, division), one_process(), TOLERANCES)


@pytest.mark.parametrize(("world", "division"), [(1, "replicas"), (2, "ep2-sharded")])
def test_a_saved_state_continues_bit_for_bit(world: int, division: str) -> None:
    for broken in run_distributed(resumed, world, CASES, DIVISIONS[division], (1, 3), timeout_s=240):
        assert broken == []


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    for broken in run_distributed(refused, 2, CASES, DIVISIONS["ep2-sharded"]):
        assert broken == []
