"""Models whose tokens differ in how many experts they pass: any division of the ranks trains the same one."""

import functools
import math
from typing import Any

import pytest
import torch

from moe.config.trainer import TrainerConfig
from moe.layers.moe import MoeLayer
from moe.layers.router import Routing
from moe.trainer import Trainer
from tests.distributed import run_distributed
from tests.moe.divisions import DIVISIONS, Cases, refused, resumed
from tests.moe.test_expert_parallel import (
    PADDED,
    Run,
    assert_bytes_are_the_lower_bound,
    assert_norms_are_those_of_the_whole_gradients,
    train,
)
from tests.moe.tiny import MTP, global_batch, relative_difference, tiny_config, tiny_trainer

BALANCE: dict[str, Any] = {"kind": "budget", "bias_update_rate": 5e-2}
CASES: Cases = {
    "identity": [
        {
            "model": {"moe": {"num_identity_experts": 6, "top_k": 4, "experts_per_token": 1.6, "output_norm": True}},
            "stability": {"balance": BALANCE, "router_z_loss": {"coefficient": 1e-2}},
        }
    ],
    "threshold": [
        {
            "model": {"moe": {"selection": {"kind": "threshold"}}},
            "stability": {"balance": {"kind": "threshold", "smoothing": 0.5}},
        }
    ],
}


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


by_case = pytest.mark.parametrize("case", CASES)


def changes_for(case: str, world: int, parallel: dict[str, Any], micro: int | None) -> list[dict[str, Any]]:
    return [MTP, *CASES[case], {"parallel": {"workers": world, **parallel}, "data": {"micro_batch_size": micro}}]


@functools.cache
def reference(case: str) -> Run:
    """One process, each batch at once."""
    [run] = run_distributed(train, 1, changes_for(case, 1, {}, None), False)
    assert isinstance(run, Run)
    return run


def check(case: str, world: int, parallel: dict[str, Any], micro: int | None = 1) -> None:
    changes = changes_for(case, world, parallel, micro)
    runs, expected = run_distributed(train, world, changes, False), reference(case)
    for number, want in enumerate(expected.steps):
        got = runs[0].steps[number]
        assert all(run.steps[number].metrics == got.metrics for run in runs), "ranks report different figures"
        for name, value in want.metrics.items():
            if "bytes" not in name:
                assert got.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-9), (number, name)
        for name, gradient in want.gradients.items():
            assert gradient.norm() > 0, name
            assert relative_difference(got.gradients[name], gradient) < 1e-5, (number, name)
    for name, weight in expected.weights.items():
        assert relative_difference(runs[0].weights[name], weight) < 1e-5, name
    assert_norms_are_those_of_the_whole_gradients(runs[0])
    assert_bytes_are_the_lower_bound(runs, changes)


@by_case
@pytest.mark.parametrize("division", [slow("replicas"), "ep2-sharded"])
def test_ranks_train_what_one_process_trains(case: str, division: str) -> None:
    check(case, 2, DIVISIONS[division])


@by_case
def test_micro_batches_add_up_to_the_batch(case: str) -> None:
    check(case, 1, {}, micro=2)


@by_case
def test_the_reference_exercises_what_is_compared(case: str) -> None:
    run = reference(case)
    assert run.steps[-1].metrics["train/loss"] < run.steps[0].metrics["train/loss"]
    for step in run.steps:
        assert step.metrics["moe/real_experts_std"] > 0.5
        assert step.metrics["moe/real_experts_none"] > 0
        assert step.metrics["train/balance_loss"] > 0
    biases = [bias for name, bias in run.weights.items() if name.endswith("expert_bias_E")]
    assert len(biases) == 3
    assert all(bias[:8].unique().numel() > 4 for bias in biases)
    if case == "identity":
        assert all(not bias[8:].any() for bias in biases)


def test_a_saved_state_continues_bit_for_bit() -> None:
    for broken in run_distributed(resumed, 2, CASES, DIVISIONS["ep2"], (1, 3)):
        assert broken == []


def test_a_step_that_is_not_taken_changes_nothing() -> None:
    for broken in run_distributed(refused, 2, CASES, DIVISIONS["ep2"]):
        assert broken == []


@pytest.mark.parametrize(("case", "expert_parallel"), [("threshold", 2), ("identity", 4)])
@pytest.mark.slow
def test_divisions_of_four_ranks_train_the_same_model(case: str, expert_parallel: int) -> None:
    check(case, 4, {"expert_parallel": expert_parallel, "dense": "shard"})


def in_bf16(rank: int, world: int, case: str) -> list[float]:
    """Losses of a run whose tokens choose by the number of the token."""
    parallel = {"expert_parallel": world}
    trainer = tiny_trainer(tiny_config(*changes_for(case, world, parallel, 2), {"precision": {"compute": "bf16"}}))
    pool, width = trainer.routers[0].config.router_outputs, trainer.routers[0].config.max_choices
    generator = torch.Generator().manual_seed(1)
    table = torch.rand(48, pool, generator=generator).topk(width, dim=1).indices
    if case == "threshold":
        table = table.masked_fill(torch.rand(table.shape, generator=generator) < 0.5, -1)

    def remember(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        ids = args[0].ids_BL[:, :16].flatten()
        for router in trainer.routers:
            router.select = lambda *_: table[ids]  # type: ignore[method-assign]

    trainer.model.register_forward_pre_hook(remember)
    return [trainer.step().metrics["train/loss"] for _ in range(3)]


@pytest.mark.parametrize("case", ["identity", slow("threshold")])
def test_bf16_ranks_agree_to_its_rounding(case: str) -> None:
    [alone], ranks = run_distributed(in_bf16, 1, case), run_distributed(in_bf16, 2, case)
    assert ranks[0] == ranks[1]
    assert ranks[0] == pytest.approx(alone, rel=1e-2)


# ---- figures ---------------------------------------------------------------------------------------------------------


def watched(trainer: Trainer) -> list[list[Routing]]:
    """Routings of every forward to come, by layer."""
    seen: list[list[Routing]] = [[] for _ in trainer.routers]
    for layer, router in enumerate(trainer.routers):
        router.register_forward_hook(lambda module, args, routing, layer=layer: seen[layer].append(routing))
    return seen


def config_of(case: str) -> TrainerConfig:
    return tiny_config(MTP, *CASES[case])


@by_case
def test_figures_are_those_of_real_tokens_and_of_experts_with_weights(case: str) -> None:
    """Token by token, in the second step, which has padding."""
    trainer = tiny_trainer(config_of(case), PADDED)
    trainer.step()
    seen = watched(trainer)
    report = trainer.step()
    numbers, violations = [], []
    for [routing] in seen:
        assert routing.real_T is not None
        tokens = [ids for ids, real in zip(routing.ids_TK.tolist(), routing.real_T.tolist(), strict=True) if real]
        assert 0 < len(tokens) < len(routing.real_T)
        loads = [sum(expert in ids for ids in tokens) for expert in range(8)]
        violations.append(max(loads) / (sum(loads) / 8) - 1)
        numbers += [sum(0 <= expert < 8 for expert in ids) for ids in tokens]
    mean = sum(numbers) / len(numbers)
    std = math.sqrt(sum((n - mean) ** 2 for n in numbers) / len(numbers))
    found = {name: report.metrics[f"moe/real_experts_{name}"] for name in ("mean", "std", "none")}
    assert found == pytest.approx({"mean": mean, "std": std, "none": numbers.count(0) / len(numbers)})
    assert report.layer_max_vio == pytest.approx(violations)
    assert report.metrics["moe/max_vio_batch"] == pytest.approx(sum(violations) / 3)
    if case == "identity":
        assert all(routing.load_E[8:].any() for [routing] in seen)


@by_case
def test_an_evaluation_counts_experts_with_weights(case: str) -> None:
    trainer = tiny_trainer(config_of(case))
    seen = watched(trainer)
    found = trainer.evaluate([global_batch(trainer.config, 90)]).counts_ME
    assert found is not None
    assert found.tolist() == [routing.load_E[:8].tolist() for [routing] in seen]


def test_a_fixed_number_of_experts_has_no_figures() -> None:
    assert not any("real_experts" in name for name in tiny_trainer(tiny_config()).step().metrics)


# ---- balance losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sequence", "batch"])
@pytest.mark.parametrize("affinity", ["sigmoid", "softmax"])
def test_a_balance_loss_is_that_of_experts_with_weights(kind: str, affinity: str) -> None:
    """The formulas token by token: raw choices among all, f and P over experts with weights."""
    loss = {"balance_loss": {"kind": kind, "coefficient": 0.5}}
    moe = {"affinity": affinity}
    trainer = tiny_trainer(tiny_config(*CASES["identity"], {"stability": loss, "model": {"moe": moe}}), (0,))
    seen, total = watched(trainer), 0.0
    metrics = trainer.step().metrics
    for [routing] in seen:
        assert routing.real_T is not None
        rows = zip(routing.logits_TE.tolist(), routing.real_T.tolist(), strict=True)
        tokens = [(index // 16, logits) for index, (logits, real) in enumerate(rows) if real]
        groups = [[z for s, z in tokens if s == sequence] for sequence in range(8)]
        for group in groups if kind == "sequence" else [[z for _, z in tokens]]:
            total += balance_of(group, affinity, per_budget=kind == "sequence") / (8 if kind == "sequence" else 1)
    assert metrics["train/balance_loss"] == pytest.approx(0.5 * total, rel=1e-5)


def balance_of(group: list[list[float]], affinity: str, *, per_budget: bool) -> float:
    f, p = [0.0] * 8, [0.0] * 8
    for logits in group:
        s = [math.exp(z) if affinity == "softmax" else 1 / (1 + math.exp(-z)) for z in logits]
        top = sorted(range(14), key=lambda expert: -logits[expert])[:4]
        for expert in range(8):
            f[expert] += expert in top
            p[expert] += s[expert] / sum(s[:8]) / len(group)
    even = 1.6 * len(group) / 8 if per_budget else sum(f) / 8
    return sum(a * b for a, b in zip(f, p, strict=True)) / even if group else 0.0


def test_nothing_but_tokens_with_an_expert_elsewhere_travels() -> None:
    """Two ranks whose tokens all choose identities send no vector at all."""
    for payload, metadata in run_distributed(bytes_of_identities, 2):
        assert payload == 0
        assert metadata > 0


def bytes_of_identities(rank: int, world: int) -> tuple[float, float]:
    changes = changes_for("identity", world, {"expert_parallel": 2}, None)
    trainer = tiny_trainer(tiny_config(*changes))
    for layer in trainer.model.moe_layers():
        assert isinstance(layer, MoeLayer)
        layer.router.expert_bias_E[:8] = -50.0
    metrics = trainer.step().metrics
    assert metrics["moe/real_experts_none"] == 1
    assert math.isfinite(metrics["train/grad_norm"])
    return metrics["train/ep_bytes_per_token"], metrics["train/ep_metadata_bytes_per_token"]
