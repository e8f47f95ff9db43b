"""Health figures against plain loops; measuring leaves no trace in training."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moe.batch import Batch
from moe.layers.moe import MoeLayer
from moe.layers.rotary import rotary_turns, rotate
from moe.model import Block, Transformer
from moe.monitors import Measurements, measure
from moe.routing_stats import bias_range, mean_pairwise_cosine
from tests.distributed import run_distributed
from tests.moe.build import ALONE, build_model, positions_of, small_config
from tests.moe.tiny import MTP, PADDED, global_batch, load, same_bits, saved, tiny_config, tiny_trainer, weights

HEALTH = ("activation/residual_rms", "attention/logit_max", "activation/expert_max", "activation/expert_kurtosis")
MHA = {"kind": "mha", "num_heads": 2, "head_dim": 8}


def padded_batch(documents: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(96, (4, 12), generator=generator)
    real = torch.ones(4, 12, dtype=torch.bool)
    real[0, 7:] = False
    real[1, 2:5] = False
    real[2] = False
    return Batch(ids, real, (torch.arange(12) // 5).expand(4, -1) if documents else None)


def activation(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "swiglu":
        return F.silu(gate) * up
    return 4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * 25 * torch.tanh(up / 25)


def logit_max(block: Block, normed: torch.Tensor, real: torch.Tensor, batch: Batch) -> float:
    """Of plain multi-head attention: every head, real query and earlier key of its document."""
    w = {name: p.detach() for name, p in block.attention.named_parameters()}
    turns = rotary_turns(normed.shape[1], 8, 10000.0, torch.device("cpu"))
    largest = -math.inf
    for head in range(2):
        rows = slice(head * 8, (head + 1) * 8)
        q, k = (rotate(normed @ w[f"{name}_proj.weight"][rows].T, turns) for name in "qk")
        for b in range(normed.shape[0]):
            for i in range(normed.shape[1]):
                for j in range(i + 1):
                    together = batch.documents_BL is None or batch.documents_BL[b, i] == batch.documents_BL[b, j]
                    if real[b, i] and together:
                        largest = max(largest, float(q[b, i] @ k[b, j]) / math.sqrt(8))
    return largest


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def plain(model: Transformer, batch: Batch, kind: str) -> dict[str, list[float]]:
    """Block by block, expert by expert, from the modules' weights."""
    length = batch.ids_BL.shape[1] - 1 - model.config.mtp.depth
    assert batch.real_BL is not None
    real, ahead = batch.real_BL[:, :length], batch.real_BL[:, :length] & batch.real_BL[:, 1 : length + 1]
    mask = None
    if batch.documents_BL is not None:
        documents = batch.documents_BL[:, :length]
        mask = ((documents[:, :, None] == documents[:, None, :]) & torch.ones(length, length).bool().tril())[:, None]
    found: dict[str, list[float]] = {name: [] for name in ("residual", "logit", "max", "kurtosis", "router", "in")}
    x = model.embed(batch.ids_BL[:, :length])
    found["embedding"] = [rms(x[real])]
    for block in model.blocks():
        counted = real
        if model.mtp is not None and block is model.mtp.block:
            found["head"] = [rms(model.norm(x)[real]), rms(model.head(model.norm(x))[real])]
            following = model.mtp.embed_norm(model.embed(batch.ids_BL[:, 1 : length + 1]))
            x, counted = model.mtp.project(torch.cat((model.mtp.hidden_norm(x), following), dim=-1)), ahead
        normed = block.attention_norm(x)
        found["logit"].append(logit_max(block, normed, counted, batch))
        middle = x + block.attention(normed, mask)
        inputs = block.ffn_norm(middle)
        if isinstance(block.ffn, MoeLayer):
            y, routing = block.ffn(inputs, positions_of(inputs))
            values = []
            for token, chosen in zip(inputs[counted], routing.ids_TK[counted.flatten()].tolist(), strict=True):
                for expert in chosen:
                    gate, up = (block.ffn.experts.w_up[expert] @ token).chunk(2)
                    values.append(activation(gate, up, kind))
            a = torch.cat(values).double()
            found["max"].append(float(a.abs().max()))
            found["kurtosis"].append(float((a - a.mean()).pow(4).mean() / a.var(correction=0) ** 2))
            found["router"].append(rms(routing.logits_TE[counted.flatten()]))
            found["in"].append(rms(inputs[counted]))
        else:
            y = block.ffn(inputs)
        x = middle + y
        found["residual"].append(rms(x[counted]))
    return found


@pytest.mark.parametrize(("documents", "kind"), [(False, "swiglu"), (True, "situ_glu")], ids=["causal", "documents"])
@torch.no_grad()
def test_figures_are_those_of_plain_loops(documents: bool, kind: str) -> None:
    model = build_model(small_config(attention=MHA, mtp={"depth": 1}, activation={"kind": kind}))
    batch = padded_batch(documents)
    found, expected = measure(model, batch, ALONE), plain(model, batch, kind)
    pairs = {
        "embedding": [found.embedding.rms],
        "head": [found.head_input.rms, found.logit_rms],
        "residual": found.residual_rms,
        "logit": found.attention_logit_max,
        "max": [layer.expert_max for layer in found.moe],
        "kurtosis": [layer.expert_kurtosis for layer in found.moe],
        "router": [layer.router_logit_rms for layer in found.moe],
        "in": [layer.router_input.rms for layer in found.moe],
    }
    assert [layer.layer for layer in found.moe] == [1, 2, 3]
    assert pairs.keys() == expected.keys()
    for name, values in pairs.items():
        assert list(values) == pytest.approx(expected[name], rel=1e-5), name
    assert found.headline() == {
        "activation/residual_rms": max(pairs["residual"]),
        "attention/logit_max": max(pairs["logit"]),
        "activation/expert_max": max(pairs["max"]),
        "activation/expert_kurtosis": max(pairs["kurtosis"]),
    }


@pytest.mark.parametrize("attention", [{"kind": "mla", "qk_norm": True}, {"kind": "mla", "scale_latents": True}, MHA])
@torch.no_grad()
def test_the_largest_logit_is_that_of_the_queries_and_keys_as_they_are_multiplied(attention: dict[str, Any]) -> None:
    model = build_model(small_config(attention={**attention, "num_heads": 1}, num_layers=2))
    attention_module = model.blocks()[0].attention
    q, k, _ = attention_module.project(model.blocks()[0].attention_norm(model.embed(torch.tensor([[3, 8]]))))
    found = measure(model, Batch(torch.tensor([[3, 8, 1]])), ALONE).attention_logit_max[0]
    logits = (q[0, 0] @ k[0, 0].T) / math.sqrt(q.shape[-1])
    assert found == pytest.approx(float(max(logits[0, 0], logits[1, 0], logits[1, 1])), rel=1e-5)


@torch.no_grad()
def test_directions_are_the_participation_ratio_of_the_inputs() -> None:
    model = build_model(small_config())
    one = measure(model, Batch(torch.full((2, 9), 5)), ALONE)
    assert one.embedding.directions == pytest.approx(1.0, rel=1e-5)
    batch = Batch(torch.arange(34).view(2, 17))
    x = model.embed(batch.ids_BL[:, :16]).flatten(0, 1).double()
    eigenvalues = torch.linalg.eigvalsh(x.T @ x)
    expected = float(eigenvalues.sum() ** 2 / eigenvalues.square().sum())
    assert measure(model, batch, ALONE).embedding.directions == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("changes", [{"moe": {"num_experts": 0}}, {}], ids=["dense", "moe"])
def test_nothing_but_padding_gives_zeros(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    nothing = Batch(torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.bool))
    found = measure(build_model(config), nothing, ALONE)
    assert set(found.headline().values()) == {0.0}
    assert bool(found.moe) == bool(config.moe.num_experts)
    assert ("activation/expert_max" in found.headline()) == bool(found.moe)


def hooks(model: Transformer) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_stays_whatever_happens() -> None:
    model = build_model(small_config())
    measure(model, padded_batch(), ALONE)
    assert hooks(model) == 0
    with pytest.raises(IndexError):
        measure(model, Batch(torch.full((1, 5), 10_000)), ALONE)
    assert hooks(model) == 0


def trained(rank: int, world: int, every: int, parallel: dict[str, Any]) -> Any:
    changes = {"monitors": {"every_steps": every}, "parallel": {"workers": world, **parallel}}
    trainer = tiny_trainer(tiny_config(MTP, {"data": {"micro_batch_size": 2}}, changes), PADDED)
    reports = [trainer.step() for _ in range(3)]
    return [report.metrics for report in reports], weights(trainer), [report.health for report in reports]


@pytest.mark.parametrize(
    ("world", "parallel"), [(1, {}), (2, {"expert_parallel": 2}), (2, {"dense": "shard"})], ids=["one", "ep2", "shard"]
)
def test_measuring_changes_not_a_bit_of_training(world: int, parallel: dict[str, Any]) -> None:
    measured, plain = (run_distributed(trained, world, every, parallel) for every in (1, 0))
    for (metrics, after, health), (plain_metrics, plain_after, no_health) in zip(measured, plain, strict=True):
        assert all(name in step for step in metrics for name in HEALTH)
        assert [{n: v for n, v in step.items() if n not in HEALTH} for step in metrics] == plain_metrics
        assert all(same_bits(after[name], plain_after[name]) for name in plain_after)
        assert no_health == [None] * 3
        assert health == measured[0][2], "ranks report different figures"


def measured_and_rewound(rank: int, world: int) -> Any:
    """Figures of the first step before, and after a measurement and a rewind; bytes counted before and after it."""
    trainer = tiny_trainer(tiny_config({"parallel": {"workers": world, "expert_parallel": 2, "dense": "shard"}}))
    start = saved(trainer)
    first = trainer.step().metrics
    sent = (trainer.ranks.wire.payload, trainer.ranks.wire.metadata)
    measure(trainer.model, trainer.batches(0)[0], trainer.ranks)
    assert (trainer.ranks.wire.payload, trainer.ranks.wire.metadata) == sent
    load(trainer, *start)
    return first, trainer.step().metrics, sent


def test_what_was_gathered_to_measure_is_forgotten_and_nothing_is_counted_as_sent() -> None:
    for first, again, sent in run_distributed(measured_and_rewound, 2):
        assert again == first
        assert min(sent) > 0


def test_every_so_many_steps_are_measured() -> None:
    reports = [tiny_trainer(tiny_config({"monitors": {"every_steps": n}})) for n in (2, 3)]
    taken = [[t.step() for _ in range(6)] for t in reports]
    assert [r.step for r in taken[0] if r.health] == [2, 4, 6]
    assert [r.step for r in taken[1] if "attention/logit_max" in r.metrics] == [3, 6]


def test_the_first_step_of_a_stage_is_measured() -> None:
    stages = {"schedule": {"kind": "stages", "stages": [{"steps": 3}, {"steps": 3, "lr": {"kind": "cosine"}}]}}
    reports = {n: tiny_trainer(tiny_config({"monitors": {"every_steps": n}}, stages)) for n in (100, 0)}
    taken = {n: [trainer.step() for _ in range(6)] for n, trainer in reports.items()}
    assert [r.step for r in taken[100] if r.health] == [4]
    assert [r.step for r in taken[0] if r.health] == []


def test_a_step_that_is_not_finite_is_measured_and_shows_the_layer() -> None:
    trainer = tiny_trainer(tiny_config({"monitors": {"every_steps": 100}}))
    healthy = trainer.step()
    last = trainer.model.layers[-1]
    assert isinstance(last, Block)
    with torch.no_grad():
        next(last.attention.parameters())[0, 0] = math.inf
    spoilt = trainer.step()
    assert (healthy.health, spoilt.taken) == (None, False)
    assert spoilt.health is not None
    finite = [math.isfinite(rms) for rms in spoilt.health.residual_rms]
    assert finite == [True] * (len(finite) - 1) + [False]


def measured_share(rank: int, world: int, changes: list[dict[str, Any]]) -> Measurements:
    config = tiny_config(MTP, {"parallel": {"workers": world}}, *changes)
    trainer = tiny_trainer(config, (0,))
    return measure(trainer.model, trainer.batches(0)[0], trainer.ranks)


@pytest.mark.parametrize("parallel", [{"expert_parallel": 2}, {}, {"expert_parallel": 2, "dense": "shard"}])
def test_ranks_measure_what_one_process_measures(parallel: dict[str, Any]) -> None:
    """The first rank's share holds a sequence of nothing but padding."""
    assert global_batch(tiny_config(MTP), 0, padded=True).real_BL is not None
    [alone] = run_distributed(measured_share, 1, [])
    for found in run_distributed(measured_share, 2, [{"parallel": parallel}]):
        assert found.residual_rms == pytest.approx(alone.residual_rms, rel=1e-5)
        assert found.attention_logit_max == pytest.approx(alone.attention_logit_max, rel=1e-5)
        assert found.logit_rms == pytest.approx(alone.logit_rms, rel=1e-5)
        for layer, expected in zip(found.moe, alone.moe, strict=True):
            assert layer.expert_max == pytest.approx(expected.expert_max, rel=1e-5)
            assert layer.expert_kurtosis == pytest.approx(expected.expert_kurtosis, rel=1e-5)
            assert layer.router_logit_rms == pytest.approx(expected.router_logit_rms, rel=1e-5)


# ---- what is cheap enough for every step ----------------------------------------------------------------------------


def test_similarity_of_routers_is_the_mean_cosine_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(1)
    routers = torch.randn(3, 6, 10, generator=generator, dtype=torch.float64) + 0.5
    expected = []
    for vectors in routers:
        pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
        cosines = [vectors[i] @ vectors[j] / (vectors[i].norm() * vectors[j].norm()) for i, j in pairs]
        expected.append(float(sum(cosines)) / len(pairs))
    sums = (routers / routers.norm(dim=2, keepdim=True)).sum(dim=1)
    assert mean_pairwise_cosine(sums, 6).tolist() == pytest.approx(expected)


def test_bias_range_is_largest_less_smallest() -> None:
    assert bias_range(torch.tensor([[0.5, -0.25, 0.0], [1.0, 1.0, 1.0]])).tolist() == [0.75, 0.0]


def test_figures_of_each_step_are_those_of_the_weights() -> None:
    trainer = tiny_trainer(tiny_config(MTP, {"stability": {"balance": {"bias_update_rate": 0.1}}}))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    metrics = trainer.step().metrics
    squares = {"dense": 0.0, "router": 0.0, "experts": 0.0}
    for name, parameter in trainer.model.named_parameters():
        group = "experts" if ".experts." in name else "router" if ".router." in name else "dense"
        squares[group] += float((parameter.detach() - before[name]).double().square().sum())
    for group, square in squares.items():
        assert metrics[f"update_norm/{group}"] == pytest.approx(math.sqrt(square), rel=1e-5)
    assert metrics["train/update_norm"] == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-5)
    ranges, similarities = [], []
    for router in trainer.routers:
        ranges.append(float(router.expert_bias_E.max() - router.expert_bias_E.min()))
        unit = router.weight.detach().double() / router.weight.detach().double().norm(dim=1, keepdim=True)
        cosines = unit @ unit.T
        similarities.append(float(cosines.sum() - cosines.trace()) / (8 * 7))
    assert metrics["moe/bias_range"] == pytest.approx(max(ranges))
    assert metrics["moe/router_similarity"] == pytest.approx(max(similarities), rel=1e-4)
