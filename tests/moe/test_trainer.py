"""One optimizer step: what it counts, when it is refused, and what its state is made of."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from moe.batch import Batch
from moe.config.balance import NoBalanceConfig
from moe.config.model import ModelConfig
from moe.layers.router import Router, Routing
from moe.report import Report, Request
from moe.schedule import Moment
from moe.stability.technique import StepLoad, Technique
from moe.trainer import Trainer
from tests.distributed import run_distributed
from tests.moe.build import ALONE
from tests.moe.tiny import (
    LENGTH,
    MTP,
    PADDED,
    VOCABULARY,
    assert_bit_identical,
    global_batch,
    local,
    same_bits,
    saved,
    share_of,
    tiny_config,
    tiny_trainer,
    trained,
    weights,
)

POISON = 47
"""A token of the vocabulary whose embedding some tests make NaN."""


class Spy(Technique):
    """Keeps the load that techniques are given."""

    def __init__(self) -> None:
        super().__init__(NoBalanceConfig(), ModelConfig(), ALONE)
        self.loads: list[torch.Tensor] = []

    def after_step(self, routers: Sequence[Router], load: StepLoad, moment: Moment) -> None:
        self.loads.append(load.counts_ME.clone())


# ---- load and bias ---------------------------------------------------------------------------------------------------


def expected_load(calls: list[list[list[int]]], batches: list[Batch], layers: int, experts: int) -> list[list[int]]:
    """Real tokens of each expert, counted one by one; calls come layer by layer for each micro-batch.

    The last layer is the MTP block's: a position is real to it if the next token, which it reads too, is.
    """
    counts = [Counter[int]() for _ in range(layers)]
    for call, ids_TK in enumerate(calls):
        batch, layer = batches[call // layers], call % layers
        length = len(ids_TK) // batch.ids_BL.shape[0]
        real = torch.ones_like(batch.ids_BL) if batch.real_BL is None else batch.real_BL
        reads_BS = real[:, :length] & (real[:, 1 : length + 1] if layer == layers - 1 else True)
        for chosen, is_real in zip(ids_TK, reads_BS.flatten().tolist(), strict=True):
            counts[layer].update(chosen if is_real else [])
    return [[counter[expert] for expert in range(experts)] for counter in counts]


def real_inputs(batch: Batch) -> tuple[int, int]:
    """Positions whose token is real, and those whose next token is real too."""
    real_BL = torch.ones_like(batch.ids_BL, dtype=torch.bool) if batch.real_BL is None else batch.real_BL
    real_BS = real_BL[:, :LENGTH]
    return int(real_BS.sum()), int((real_BS & real_BL[:, 1 : LENGTH + 1]).sum())


def trained_with_spies(rank: int, world: int, changes: list[dict[str, Any]]) -> Any:
    """(expert ids of every router call of each step, loads given to techniques, biases after each step, reports)"""
    trainer = tiny_trainer(tiny_config(MTP, {"parallel": {"workers": world}}, *changes), PADDED)
    spy = Spy()
    trainer.techniques["spy"] = spy
    calls: list[list[list[int]]] = []

    def remember(module: torch.nn.Module, args: Any, routing: Routing) -> None:
        calls.append(routing.ids_TK.tolist())

    for router in trainer.routers:
        router.register_forward_hook(remember)
    ids, biases, reports = [], [], []
    for _ in range(3):
        calls.clear()
        reports.append(trainer.step())
        ids.append(list(calls))
        biases.append([router.expert_bias_E.clone() for router in trainer.routers])
    return ids, spy.loads, biases, reports


@pytest.mark.parametrize(("world", "expert_parallel", "micro"), [(1, 1, 2), (2, 2, 2)])
def test_one_sign_update_follows_the_load_summed_over_micro_batches_and_ranks(
    world: int, expert_parallel: int, micro: int
) -> None:
    changes: list[dict[str, Any]] = [
        {"parallel": {"expert_parallel": expert_parallel}, "data": {"micro_batch_size": micro}}
    ]
    config = tiny_config(MTP, {"parallel": {"workers": world}}, *changes)
    layers, experts = config.model.num_moe_layers, config.model.moe.num_experts
    assert layers == 3, "the MTP block has a router of its own"
    results = run_distributed(trained_with_spies, world, changes)
    expected_bias = [[0.0] * experts for _ in range(layers)]
    for step in range(3):
        whole = global_batch(config, step, padded=step in PADDED)
        total = torch.zeros(layers, experts, dtype=torch.int64)
        for rank, (ids, _, _, _) in enumerate(results):
            total += torch.tensor(expected_load(ids[step], share_of(whole, config, rank), layers, experts))
        for _, loads, biases, reports in results:
            assert loads[step].dtype == torch.int64
            assert torch.equal(loads[step], total)
            busiest, mean = total.max(dim=1).values.double(), total.double().mean(dim=1)
            assert reports[step].metrics["moe/max_vio_batch"] == pytest.approx(float((busiest / mean - 1).mean()))
            assert reports[step].metrics["moe/max_vio_batch_worst"] == pytest.approx(float((busiest / mean - 1).max()))
            for layer, counts in enumerate(total.tolist()):
                if biases is results[0][2]:
                    average = sum(counts) / experts
                    signs = [(average > count) - (average < count) for count in counts]
                    rate = config.stability.balance.bias_update_rate  # type: ignore[union-attr]
                    shift = sum(signs) / experts
                    old = expected_bias[layer]
                    expected_bias[layer] = [b + rate * (sign - shift) for b, sign in zip(old, signs, strict=True)]
                torch.testing.assert_close(biases[step][layer], torch.tensor(expected_bias[layer]), rtol=0, atol=1e-7)
                assert biases[step][layer].any(), "a router that the update forgot"


def recompute_layers(trainer: Trainer) -> None:
    for layer in trainer.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def test_a_recomputed_forward_is_not_counted_again() -> None:
    assert_bit_identical(trained([]), trained([], recompute_layers))


def test_padding_tokens_are_neither_load_nor_loss() -> None:
    """Whatever stands in the padding, nothing but rounding changes: not the loss, not the load, not an update."""
    config = tiny_config(MTP)
    outcomes = []
    for filler in (0, 9):
        batch = global_batch(config, 0, padded=True)
        assert batch.real_BL is not None
        ids_BL = batch.ids_BL.masked_fill(~batch.real_BL, filler)
        trainer = tiny_trainer(config)
        filled = Batch(ids_BL, batch.real_BL)
        trainer.batches = lambda step, filled=filled: [filled]  # type: ignore[misc]
        spy = trainer.techniques["spy"] = Spy()
        metrics = trainer.step().metrics
        outcomes.append((metrics, spy.loads[0], weights(trainer)))
        # One that ends the sequence counts although it predicts nothing. The MTP block reads the next token as well.
        real, pairs = real_inputs(batch)
        assert spy.loads[0].sum(dim=1).tolist() == [config.model.moe.top_k * n for n in (real, real, pairs)]
    (a, load_a, weights_a), (b, load_b, weights_b) = outcomes
    assert torch.equal(load_a, load_b)
    for name in a:
        assert a[name] == pytest.approx(b[name], rel=1e-6), name
    for name, weight in weights_a.items():
        torch.testing.assert_close(weight, weights_b[name], rtol=1e-5, atol=1e-7)


def test_the_loss_is_the_mean_over_real_tokens_of_the_global_batch() -> None:
    config = tiny_config(MTP, {"data": {"micro_batch_size": 2}})
    trainer = tiny_trainer(config, padded_steps=(0,))
    batch, length = global_batch(config, 0, padded=True), config.data.sequence_length
    assert batch.real_BL is not None
    with torch.no_grad():
        output = trainer.model(batch)
    assert output.mtp_logits is not None
    metrics = trainer.step().metrics
    for name, logits, ahead, weight in [("loss", output.logits, 1, 1.0), ("mtp_loss", output.mtp_logits, 2, 0.3)]:
        losses = []
        for b in range(config.data.global_batch_size):
            for s in range(length):
                if batch.real_BL[b, s : s + ahead + 1].all():
                    p = logits[b, s].double().softmax(dim=0)[batch.ids_BL[b, s + ahead]]
                    losses.append(-math.log(p))
        assert metrics[f"train/{name}"] == pytest.approx(weight * sum(losses) / len(losses), rel=1e-5)


def only_one_rank_has_padding(rank: int, world: int) -> Report:
    config = tiny_config(MTP, {"parallel": {"workers": world}})
    trainer = tiny_trainer(config)
    batch = global_batch(config, 0, padded=True)
    assert batch.real_BL is not None
    shares = [share_of(batch, config, 0), [Batch(share.ids_BL) for share in share_of(batch, config, 1)]]
    trainer.batches = lambda step: shares[rank]
    return trainer.step()


def test_padding_on_one_rank_alone_does_not_hang() -> None:
    a, b = run_distributed(only_one_rank_has_padding, 2)
    assert a.metrics == b.metrics
    assert a.taken


def test_a_batch_of_nothing_but_padding_has_no_loss() -> None:
    trainer = tiny_trainer(tiny_config(MTP))
    batch = global_batch(trainer.config, 0)
    trainer.batches = lambda step: [Batch(batch.ids_BL, torch.zeros_like(batch.ids_BL, dtype=torch.bool))]
    metrics = trainer.step().metrics
    assert metrics["train/loss"] == metrics["train/mtp_loss"] == metrics["train/grad_norm"] == 0.0


# ---- a step that is refused ------------------------------------------------------------------------------------------


def poison_weight(trainer: Trainer) -> None:
    """NaN where only token POISON reads it."""
    table = local(trainer.model.embed.weight.detach())
    first = trainer.ranks.rank * table.shape[0] if table.shape[0] < VOCABULARY else 0
    if first <= POISON < first + table.shape[0]:
        table[POISON - first] = float("nan")


def poison_gradient(trainer: Trainer) -> None:
    """Infinity in one expert's gradient on the last rank, at the second step; the loss stays finite."""
    if trainer.ranks.rank < trainer.ranks.world - 1:
        return

    def explode(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (float("inf") if trainer.steps_done == 1 else 1.0)

    trainer.model.moe_layers()[0].experts.w_up.register_hook(explode)


def refused_step(rank: int, world: int, parallel: dict[str, Any], how: str) -> Any:
    """(taken flags, was the state untouched by the second step, its loss, its norm, scalars after each step)"""
    config = tiny_config(MTP, {"parallel": {"workers": world, **parallel}})
    trainer = tiny_trainer(config)

    def batches(step: int) -> list[Batch]:
        shares = share_of(global_batch(config, step), config, rank)
        ids = shares[0].ids_BL.where(shares[0].ids_BL != POISON, 0)
        if step == 1 and how == "weight" and rank == world - 1:
            ids[0, 3] = POISON
        return [Batch(ids)]

    trainer.batches = batches
    poison_weight(trainer) if how == "weight" else poison_gradient(trainer)
    first = trainer.step()
    before, scalars_before = saved(trainer)
    second = trainer.step()
    after, scalars_after = saved(trainer)
    third = trainer.step()
    untouched = all(same_bits(before[name], after[name]) for name in before)
    changed = not any(same_bits(saved(trainer)[0][name], after[name]) for name in after if name.endswith("bias_E"))
    taken = [first.taken, second.taken, third.taken]
    return taken, untouched, changed, second.metrics, scalars_before, scalars_after


@pytest.mark.parametrize("how", ["weight", "gradient"])
@pytest.mark.parametrize(
    ("world", "parallel"),
    [(1, {}), (2, {}), (2, {"expert_parallel": 2}), (2, {"expert_parallel": 2, "dense": "shard"})],
    ids=["alone", "replicas", "ep2", "ep2-sharded"],
)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(
    world: int, parallel: dict[str, Any], how: str
) -> None:
    for taken, untouched, changed, metrics, before, after in run_distributed(refused_step, world, parallel, how):
        assert taken == [True, False, True]
        assert untouched, "weights, moments or biases moved although the step was not taken"
        assert changed, "the step after it was taken"
        assert math.isfinite(metrics["train/loss"]) == (how == "gradient")
        assert not math.isfinite(metrics["train/grad_norm"])
        assert "train/update_norm" not in metrics
        assert after == {**before, "steps_done": before["steps_done"] + 1}


# ---- evaluation, idle experts, requests ------------------------------------------------------------------------------


def test_evaluation_leaves_training_as_it_was() -> None:
    trainer = tiny_trainer(tiny_config(MTP), PADDED)
    held_out = [global_batch(trainer.config, 90), global_batch(trainer.config, 91, padded=True)]
    metrics = []
    for _ in range(3):
        trainer.evaluate(held_out)
        metrics.append(trainer.step().metrics)
        evaluation = trainer.evaluate(held_out)
    assert_bit_identical((metrics, weights(trainer)), trained([]))
    inputs, predicted = (sum(count) for count in zip(*map(real_inputs, held_out), strict=True))
    assert evaluation.tokens == predicted
    assert evaluation.counts_ME is not None
    assert evaluation.counts_ME.sum(dim=1).tolist() == [2 * inputs, 2 * inputs, 2 * predicted]


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def starved(rank: int, world: int, parallel: dict[str, Any]) -> Any:
    """The state around three steps in which no token reaches expert 7, whole on every rank."""
    changes: dict[str, Any] = {"stability": {"balance": {"kind": "none"}}, "parallel": {"workers": world, **parallel}}
    trainer = tiny_trainer(tiny_config(changes))
    spy = trainer.techniques["spy"] = Spy()
    trainer.step()
    trainer.step()
    assert spy.loads[-1][:, 7].all()
    for router in trainer.routers:
        router.expert_bias_E[7] = -100.0
    states, lrs = [], []
    for _ in range(4):
        tensors = trainer.state().tensors
        states.append({name: whole_tensor(tensor) for name, tensor in tensors.items()})
        lrs.append(trainer.step().metrics["train/lr"])
    assert not torch.stack(spy.loads[2:])[:, :, 7].any()
    return states, lrs[:3]


def test_an_expert_without_tokens_decays_and_its_moments_fade_alike_on_any_number_of_ranks() -> None:
    [(states, lrs)] = run_distributed(starved, 1, {})
    first, last = states[0], states[3]
    name = "layers.1.ffn.experts.w_up"
    assert first[f"optimizer.exp_avg.{name}"][7].any()
    faded = {"exp_avg": 0.9**3, "exp_avg_sq": 0.95**3}
    for moment, factor in faded.items():
        got, start = last[f"optimizer.{moment}.{name}"][7], first[f"optimizer.{moment}.{name}"][7]
        torch.testing.assert_close(got, start * factor, rtol=1e-5, atol=0)
    weight = first[f"model.{name}"][7].double()
    m, v = (first[f"optimizer.{moment}.{name}"][7].double() for moment in faded)
    for done, lr in enumerate(lrs, start=3):
        m, v = 0.9 * m, 0.95 * v
        corrected = (v / (1 - 0.95**done)).sqrt() + 1e-3
        weight = weight * (1 - lr * 0.1) - lr * (m / (1 - 0.9**done)) / corrected
    torch.testing.assert_close(last[f"model.{name}"][7].double(), weight, rtol=1e-5, atol=1e-7)
    for world_states, _ in run_distributed(starved, 2, {"expert_parallel": 2}):
        for key, tensor in states[3].items():
            torch.testing.assert_close(world_states[3][key], tensor, rtol=1e-4, atol=1e-7)


def requests_of_one_rank(rank: int, world: int) -> list[frozenset[Request]]:
    trainer = tiny_trainer(tiny_config({"parallel": {"workers": world}}))
    seen = [trainer.step().requests]
    if rank == 1:
        trainer.request("save")
    seen.append(trainer.step().requests)
    if rank == 1:
        trainer.request("stop")
    else:
        trainer.request("save")
    seen.append(trainer.step().requests)
    seen.append(trainer.step().requests)
    return seen


def test_a_request_of_one_rank_is_seen_by_all_in_the_same_step() -> None:
    for seen in run_distributed(requests_of_one_rank, 2):
        assert seen == [frozenset(), frozenset({"save"}), frozenset({"save", "stop"}), frozenset()]
