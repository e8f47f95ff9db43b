"""Experts by token id: the table against plain integers, and what hash layers have no part in."""

from typing import Any

import pytest
import torch

from moe.batch import Batch
from moe.layers.hash_routing import hash_table
from moe.model import ModelOutput
from moe.stability.technique import BatchCounts
from moe.trainer import Trainer
from tests.moe.build import ALONE, build_model, random_ids, small_config
from tests.moe.tiny import MTP, batches_of, relative_difference, tiny_config, tiny_trainer

HASHED: dict[str, Any] = {"model": {"num_layers": 4, "moe": {"hash_layers": 2}}}


def splitmix64(state: int) -> int:
    mask = 2**64 - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def plain_row(token: int, experts: int, k: int, layer: int) -> list[int]:
    golden = 0x9E3779B97F4A7C15
    chosen: list[int] = []
    for draw, last in enumerate(range(experts - k, experts)):
        number = (splitmix64((splitmix64(token * golden + layer) + draw) * golden) >> 1) % (last + 1)
        chosen.append(last if number in chosen else number)
    return sorted(chosen)


@pytest.mark.parametrize(("experts", "k"), [(16, 4), (256, 6), (8, 8), (3, 1)])
def test_the_table_is_that_of_plain_integers(experts: int, k: int) -> None:
    """Fixed for good: a run goes on with the experts that it began with."""
    for layer in (0, 1, 5):
        table_VK = hash_table(300, experts, k, layer)
        assert table_VK.dtype == torch.int64
        assert table_VK.tolist() == [plain_row(token, experts, k, layer) for token in range(300)]
        assert all(len(set(row)) == k for row in table_VK.tolist())


def test_entries_are_spread_as_evenly_as_chance_spreads_them() -> None:
    vocabulary, experts, k = 40_000, 32, 4
    tables = [hash_table(vocabulary, experts, k, layer) for layer in (0, 1)]
    share = k / experts
    for table_VK in tables:
        counts_E = table_VK.flatten().bincount(minlength=experts).double()
        deviation_E = (counts_E - vocabulary * share) / (vocabulary * share * (1 - share)) ** 0.5
        assert deviation_E.abs().max() < 4.5
        assert 0.4 < deviation_E.std() < 1.6
    shared = (tables[0].unsqueeze(2) == tables[1].unsqueeze(1)).sum() / (vocabulary * k)
    assert shared.item() == pytest.approx(share, abs=0.01), "layers agree no more often than by chance"


@pytest.mark.parametrize("affinity", ["sigmoid", "softmax", "sqrt_softplus"])
def test_a_hash_layer_takes_its_experts_from_the_table_and_its_gates_from_its_own_router(affinity: str) -> None:
    moe = {"hash_layers": 1, "num_groups": 8, "top_groups": 2, "routed_scaling_factor": 1.5, "affinity": affinity}
    model = build_model(small_config(moe=moe, mtp={"depth": 1}), bias=(-3.0, 3.0))
    ids = random_ids(2, 12)
    first, second, ahead = model(Batch(ids)).routings
    table_VK = hash_table(96, 16, 4, 1)
    assert torch.equal(first.ids_TK, table_VK[ids[:, :10].flatten()])
    gate_TK = first.affinity_TE.gather(1, first.ids_TK)
    torch.testing.assert_close(first.gates_TK, 1.5 * gate_TK / gate_TK.sum(dim=1, keepdim=True))
    assert first.load_E.tolist() == first.ids_TK.flatten().bincount(minlength=16).tolist()
    for chosen in (second, ahead):
        groups = chosen.ids_TK // 2
        assert all(len(set(row)) <= 2 for row in groups.tolist()), "layers that choose keep to their groups"
    assert any(len(set(row)) > 2 for row in (first.ids_TK // 2).tolist())


def test_given_experts_are_taken_in_hash_layers_too() -> None:
    model = build_model(small_config(moe={"hash_layers": 2}))
    given = [torch.arange(4).expand(10, 4), torch.arange(4, 8).expand(10, 4)]
    routings = model(Batch(random_ids(1, 11)), given).routings
    assert all(torch.equal(r.ids_TK, ids_TK) for r, ids_TK in zip(routings, given, strict=True))


def test_tables_are_no_state() -> None:
    trainer = tiny_trainer(tiny_config(HASHED))
    plain = tiny_trainer(tiny_config({"model": {"num_layers": 4}}))
    assert trainer.state().tensors.keys() == plain.state().tensors.keys()
    assert trainer.model.state_dict().keys() == plain.model.state_dict().keys()


@pytest.mark.parametrize("kind", ["sequence", "batch"])
@pytest.mark.parametrize("balance", ["sign", "proportional", "smebu", "quantile"])
def test_hash_layers_have_neither_balance_loss_nor_bias(kind: str, balance: str) -> None:
    stability = {"balance_loss": {"kind": kind, "coefficient": 0.5}, "balance": {"kind": balance}}
    trainer = tiny_trainer(tiny_config(MTP, HASHED, {"stability": stability}))
    batch = batches_of(trainer.config, 0)(0)[0]
    output = trainer.model(batch)
    expected = sum(_balance(routing, kind, batch) for routing in output.routings[2:])
    assert _term("balance_loss", trainer, batch, output).item() == pytest.approx(0.5 * expected, rel=1e-5)
    for _ in range(3):
        assert trainer.step().taken
    moved = [bool(router.expert_bias_E.any()) for router in trainer.routers]
    assert moved == [False, False, True, True]


def _term(name: str, trainer: Trainer, batch: Batch, output: ModelOutput) -> torch.Tensor:
    """The loss of the technique ``name``, where ``batch`` is the whole batch, without padding."""
    moment, (sequences, length, _) = trainer.timeline.at(0), output.logits.shape
    counts = BatchCounts(sequences * length, sequences * length, sequences, sequences * length)
    return trainer.techniques[name].loss_terms(batch, output, counts, moment)[name]


def _balance(routing: Any, kind: str, batch: Batch) -> float:
    """``sum_i f_i P_i`` of one layer in plain loops, per sequence or over the batch."""
    k, experts = routing.ids_TK.shape[1], routing.logits_TE.shape[1]
    shares = (routing.affinity_TE / routing.affinity_TE.sum(dim=1, keepdim=True)).tolist()
    tops = [set(sorted(range(experts), key=lambda e: -row[e])[:k]) for row in routing.affinity_TE.tolist()]
    sequences = len(batch.ids_BL) if kind == "sequence" else 1
    length = len(shares) // sequences
    total = 0.0
    for start in range(0, len(shares), length):
        rows = range(start, start + length)
        for e in range(experts):
            f = experts / (k * length) * sum(e in tops[t] for t in rows)
            total += f * sum(shares[t][e] for t in rows) / length
    return total / sequences


def test_the_router_z_loss_counts_hash_layers() -> None:
    """Their logits make gates, and may drift as others do."""
    trainer = tiny_trainer(tiny_config(HASHED, {"stability": {"router_z_loss": {"coefficient": 0.1}}}))
    batch = batches_of(trainer.config, 0)(0)[0]
    output = trainer.model(batch)
    wanted = sum(r.logits_TE.logsumexp(dim=1).square().mean().item() for r in output.routings)
    assert _term("router_z_loss", trainer, batch, output).item() == pytest.approx(0.1 * wanted, rel=1e-5)
    assert len(output.routings) == 3


def test_max_vio_is_of_the_layers_that_choose_and_the_detail_of_all() -> None:
    trainer = tiny_trainer(tiny_config(HASHED))
    loads = [r.load_E.tolist() for r in trainer.model(batches_of(trainer.config, 0)(0)[0]).routings]
    report = trainer.step()
    each = [max(load) / (sum(load) / len(load)) - 1 for load in loads]
    assert report.layer_max_vio == pytest.approx(each)
    assert report.metrics["moe/max_vio_batch"] == pytest.approx(each[2])
    assert report.metrics["moe/max_vio_batch_worst"] == pytest.approx(each[2])


@pytest.mark.parametrize("loss", ["none", "sequence"])
def test_a_model_of_hash_layers_alone_trains_and_has_nothing_to_balance(loss: str) -> None:
    all_hashed = {"model": {"moe": {"hash_layers": 2}}, "stability": {"balance_loss": {"kind": loss}}}
    trainer = tiny_trainer(tiny_config(all_hashed), (0,))
    report = trainer.step()
    assert report.taken
    assert len(report.layer_max_vio) == 2
    assert "moe/max_vio_batch" not in report.metrics
    assert "train/balance_loss" not in report.metrics
    assert report.metrics["moe/bias_abs_max"] == 0.0


def test_padding_of_another_token_changes_nothing_in_a_hash_layer() -> None:
    config = tiny_config(HASHED)
    batch = batches_of(config, 0, (0,))(0)[0]
    assert batch.real_BL is not None
    other = Batch(torch.where(batch.real_BL, batch.ids_BL, (batch.ids_BL + 5) % 48), batch.real_BL)
    found = []
    for each in (batch, other):
        trainer = Trainer(config, ALONE, lambda step, each=each: [each])  # type: ignore[misc]
        report = trainer.step()
        found.append((report, [p.detach().clone() for p in trainer.model.parameters()]))
    assert found[0][0].layer_max_vio == found[1][0].layer_max_vio
    assert found[0][0].metrics["train/loss"] == pytest.approx(found[1][0].metrics["train/loss"], rel=1e-6)
    assert all(relative_difference(a, b) < 1e-6 for a, b in zip(found[0][1], found[1][1], strict=True))
