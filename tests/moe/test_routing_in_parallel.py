"""Hash layers, biases by class and node limits: any division trains the same, resumes, and refuses a step alike."""

from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.moe.divisions import (
    DIVISIONS,
    Cases,
    assert_same_training,
    by_corner,
    reference,
    refused,
    resumed,
    runs_of,
)
from tests.moe.stability.test_balance_expert_parallel import recompute_layers
from tests.moe.test_expert_parallel import BF16, FP32, Run, assert_norms_are_those_of_the_whole_gradients, train
from tests.moe.test_expert_parallel import assert_same_training as assert_same_gradients
from tests.moe.tiny import MTP, assert_bit_identical, trained

GROUPS = {"num_groups": 4, "top_groups": 2, "top_k": 3}
# As DeepSeek-V4 routes, and what it left behind.
TOGETHER: list[dict[str, Any]] = [
    {"model": {"moe": {"hash_layers": 1, "bias_domains": 2, **GROUPS, "group_score": "unbiased"}}},
    {"model": {"moe": {"affinity": "sqrt_softplus"}}, "parallel": {"expert_nodes": 4}},
]
QUANTILE: dict[str, Any] = {"balance": {"kind": "quantile", "smoothing": 0.3}, "balance_loss": {"kind": "none"}}
CASES: Cases = {
    "together": TOGETHER,
    "smebu by class": [{"model": {"moe": {"bias_domains": 3}}, "stability": {"balance": {"kind": "smebu"}}}],
    "quantile by class, hashed": [
        {"model": {"moe": {"bias_domains": 2, "hash_layers": 1}}, "stability": QUANTILE},
    ],
    "all hashed": [{"model": {"moe": {"hash_layers": 2}}}],
}


# Hash layers alone have nothing to remember.
REMEMBERING = {name: changes for name, changes in CASES.items() if name != "all hashed"}


@by_corner
def test_ranks_train_what_one_process_trains(division: str) -> None:
    assert_same_training(runs_of(CASES, division), reference(CASES), {})


def test_a_saved_state_makes_the_next_steps_bit_identical() -> None:
    assert run_distributed(resumed, 2, REMEMBERING, DIVISIONS["ep2"], (1, 3)) == [[], []]


def test_a_step_that_is_not_taken_changes_nothing() -> None:
    assert run_distributed(refused, 2, CASES, DIVISIONS["ep2"]) == [[], []]


@pytest.mark.parametrize("case", ["together", "quantile by class, hashed"])
def test_a_recomputed_forward_is_not_counted_again(case: str) -> None:
    changes = [*CASES[case], {"data": {"micro_batch_size": 4}}]
    assert_bit_identical(trained(changes), trained(changes, recompute_layers))


def gradient_changes(world: int, parallel: dict[str, Any], compute: str, micro: int | None) -> list[dict[str, Any]]:
    loss = {"stability": {"balance_loss": {"kind": "none"}}} if compute == "bf16" else {}
    run = {"data": {"micro_batch_size": micro}, "precision": {"compute": compute}}
    return [MTP, *TOGETHER, {"parallel": {"workers": world, **parallel}}, run, loss]


@pytest.mark.parametrize("compute", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_gradient_is_that_of_one_process(compute: str) -> None:
    """In bf16 the choice is forced where there is one; hash layers choose alike by themselves."""
    forced, micro = compute == "bf16", 2 if compute == "bf16" else 1
    [expected] = run_distributed(train, 1, gradient_changes(1, {}, compute, None), forced)
    runs: list[Run] = run_distributed(train, 2, gradient_changes(2, {"expert_parallel": 2}, compute, micro), forced)
    assert_same_gradients(runs, expected, BF16 if forced else FP32)
    assert_norms_are_those_of_the_whole_gradients(runs[0])


def test_the_cases_exercise_what_is_compared() -> None:
    runs = reference(CASES)
    metrics = runs["together"].metrics[-1]
    assert 1 < metrics["moe/nodes_per_token"] < 3
    assert metrics["moe/max_vio_domain_worst"] > metrics["moe/max_vio_batch"] > 0
    for name, run in runs.items():
        biases = {key: bias for key, bias in run.weights.items() if "expert_bias" in key}
        hashed = {"together": 1, "quantile by class, hashed": 1, "all hashed": 2}.get(name, 0)
        assert [bool(bias.any()) for bias in biases.values()] == [False] * hashed + [True] * (len(biases) - hashed)
        if "class" in name:
            last = list(biases.values())[-1]
            assert all(row.any() for row in last)
            assert not last[0].equal(last[1])
