"""The model of bytes on the wire: worked numbers, brute force, what was measured, and the node-limited guarantee."""

import itertools
import math
import random
from typing import Any

import pytest
import torch

from moe.config.trainer import TrainerConfig
from moe.layers.router import Routing
from moe.traffic import Spread, combine_bytes, dispatch_bytes, payload_bytes
from moe.trainer import Trainer
from tests.distributed import run_distributed
from tests.moe.tiny import MTP, batches_of, tiny_config, tiny_trainer


def test_unlimited_routing_to_256_experts_on_8_nodes_visits_5_3_of_them() -> None:
    spread = Spread(256, 8)
    missed = math.prod((224 - draw) / (256 - draw) for draw in range(8))
    assert spread.expected_parts(8) == pytest.approx(8 * (1 - missed))
    assert spread.expected_parts(8) == pytest.approx(5.295, abs=5e-4)
    rng = random.Random(0)
    ids = torch.tensor([rng.sample(range(256), 8) for _ in range(4000)])
    assert spread.parts_per_token(ids).double().mean().item() == pytest.approx(spread.expected_parts(8), abs=0.06)


def test_the_expected_number_of_parts_is_that_of_all_choices() -> None:
    spread = Spread(8, 4)
    choices = list(itertools.combinations(range(8), 3))
    mean = sum(len({expert // 2 for expert in chosen}) for chosen in choices) / len(choices)
    assert spread.expected_parts(3) == pytest.approx(mean)
    assert Spread(8, 1).expected_parts(3) == 1.0


def test_parts_are_counted_once_and_ids_beyond_the_experts_nowhere() -> None:
    ids = torch.tensor([[0, 1, 2], [0, 4, 7], [3, 5, 8], [8, 9, 11]])
    assert Spread(8, 4).parts_per_token(ids).tolist() == [2, 3, 2, 0]
    assert [Spread(8, 4).remote_visits(ids, here) for here in range(4)] == [5, 5, 5, 6]
    assert Spread(8, 4).parts_per_token(ids[:0]).tolist() == []
    with pytest.raises(ValueError, match="8 experts do not divide into 3 equal parts"):
        Spread(8, 3)


def test_bytes_of_a_token_of_deepseek_v3() -> None:
    """7.2 KB out (a value a byte, and a scale for every 128 of them), 14.3 KB back."""
    assert dispatch_bytes(7168, "fp8") == 7168 + 56
    assert combine_bytes(7168, "fp8") == 14_336
    assert dispatch_bytes(130, "fp8") == 130 + 2
    assert (dispatch_bytes(7168, "bf16"), combine_bytes(7168, "bf16")) == (14_336, 14_336)
    assert (dispatch_bytes(7168, "fp32"), combine_bytes(7168, "fp32")) == (28_672, 28_672)
    # At most 4 nodes, one of them the token's own or not.
    assert payload_bytes(4, 7168, "fp8", training=False) == 4 * (7224 + 14_336)
    assert payload_bytes(4, 7168, "fp8", training=True) == 4 * (7224 + 3 * 14_336)


LIMITED: dict[str, Any] = {"num_experts": 16, "num_groups": 8, "top_groups": 2, "top_k": 4}


def config_of(world: int, compute: str, moe: dict[str, Any]) -> TrainerConfig:
    parallel = {"workers": world, "expert_parallel": world}
    precision: dict[str, Any] = {"compute": compute}
    if compute == "fp8":
        precision = {"compute": "bf16", "fp8": {"kind": "deepseek_v3", "dispatch": True}}
    return tiny_config(MTP, {"model": {"moe": moe}, "parallel": parallel, "precision": precision})


def predicted_and_measured(rank: int, world: int, compute: Any, moe: dict[str, Any]) -> dict[str, list[int]]:
    """Payload of this rank's sends in training and in evaluation: by the ids of its own tokens, and as counted."""
    trainer = tiny_trainer(config_of(world, compute, moe), (1,))
    spread = Spread(trainer.config.model.moe.num_experts, world)
    visits = 0

    def count(module: torch.nn.Module, args: Any, routing: Routing) -> None:
        nonlocal visits
        visits += spread.remote_visits(routing.ids_TK, rank)

    for router in trainer.routers:
        router.register_forward_hook(count)
    found: dict[str, list[int]] = {"predicted": [], "measured": []}
    width = trainer.config.model.hidden_size
    for training in (True, True, False):
        visits = 0
        trainer.ranks.wire.clear()
        if training:
            trainer.step()
        else:
            trainer.evaluate(batches_of(trainer.config, rank)(3))
        found["predicted"].append(payload_bytes(visits, width, compute, training=training))
        found["measured"].append(trainer.ranks.wire.payload)
    return found


@pytest.mark.parametrize(
    ("world", "compute", "moe"),
    [(2, "fp32", {"hash_layers": 1}), (2, "bf16", LIMITED), (2, "fp8", LIMITED), (4, "fp32", LIMITED)],
)
def test_what_is_predicted_from_expert_ids_is_what_was_sent(world: int, compute: str, moe: dict[str, Any]) -> None:
    ranks = run_distributed(predicted_and_measured, world, compute, moe)
    predicted, measured = ([sum(step) for step in zip(*(r[k] for r in ranks), strict=True)] for k in ranks[0])
    assert predicted == measured
    assert all(bytes_sent > 0 for bytes_sent in measured)


def nodes_per_token(trainer: Trainer) -> list[list[int]]:
    """Of each layer's real tokens at the first step, in plain sets."""
    nodes, experts = trainer.config.parallel.expert_nodes, trainer.config.model.moe.num_experts
    assert nodes is not None
    found = []
    for routing in trainer.model(batches_of(trainer.config, 0, (0,))(0)[0]).routings:
        real = [True] * len(routing.ids_TK) if routing.real_T is None else routing.real_T.tolist()
        rows = zip(routing.ids_TK.tolist(), real, strict=True)
        found.append([len({e // (experts // nodes) for e in ids}) for ids, counts in rows if counts])
    return found


@pytest.mark.parametrize("group_score", ["biased", "unbiased"])
def test_a_limit_on_groups_that_lie_on_nodes_is_a_limit_on_nodes(group_score: str) -> None:
    """Also where several groups share a node; hash layers know no limit. Padding does not count."""
    nodes = {"parallel": {"expert_nodes": 4}}
    moe = {**LIMITED, "group_score": group_score, "hash_layers": 1}
    trainers = {
        "limited": tiny_trainer(tiny_config(MTP, nodes, {"model": {"moe": moe}}), (0,)),
        "unlimited": tiny_trainer(
            tiny_config(MTP, nodes, {"model": {"moe": {**LIMITED, "top_groups": 8, "hash_layers": 1}}}), (0,)
        ),
    }
    means = {}
    for name, trainer in trainers.items():
        for router in trainer.routers[1:]:
            router.biases.copy_(0.1 * (2.4 * torch.arange(16)).sin())
        hashed, *chosen = nodes_per_token(trainer)
        assert max(hashed) > 2
        assert (max(map(max, chosen)) <= 2) == (name == "limited")
        every = [count for layer in (hashed, *chosen) for count in layer]
        means[name] = trainer.step().metrics["moe/nodes_per_token"]
        assert means[name] == pytest.approx(sum(every) / len(every))
    assert means["limited"] < means["unlimited"]


def test_nodes_are_not_counted_unless_asked_for() -> None:
    assert "moe/nodes_per_token" not in tiny_trainer(tiny_config()).step().metrics


@pytest.mark.parametrize(
    ("parallel", "moe", "named"),
    [
        ({"expert_nodes": 3}, {}, r"parallel.expert_nodes \(3\) does not divide model.moe.num_experts \(8\)"),
        ({"expert_nodes": 2}, {"num_experts": 0}, r"parallel.expert_nodes \(2\) has no effect"),
        (
            {"expert_nodes": 2, "workers": 3, "expert_parallel": 3},
            {"num_experts": 12},
            r"expert_parallel \(3\): a rank's experts would lie on two nodes",
        ),
        (
            {"expert_nodes": 4},
            {"num_experts": 24, "num_groups": 6, "top_groups": 2},
            r"num_groups \(6\): a group of experts would straddle nodes.*set num_groups to 4 or a multiple",
        ),
    ],
)
def test_nodes_that_do_not_fit_are_refused(parallel: dict[str, Any], moe: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_config({"model": {"moe": moe}, "parallel": parallel, "data": {"global_batch_size": 12}})


@pytest.mark.parametrize(
    ("parallel", "moe"),
    [
        ({"expert_nodes": 4}, {"num_experts": 24, "num_groups": 2, "top_groups": 1}),
        ({"expert_nodes": 4}, {"num_experts": 24, "num_groups": 12, "top_groups": 4}),
        # All groups may be chosen: there is no limit that could miss the nodes.
        ({"expert_nodes": 4}, {"num_experts": 24, "num_groups": 6, "top_groups": 6}),
        ({"expert_nodes": 8, "workers": 2, "expert_parallel": 2}, {}),
        ({"expert_nodes": 2, "workers": 4, "expert_parallel": 4}, {}),
    ],
)
def test_nodes_that_nest_with_groups_and_ranks_are_accepted(parallel: dict[str, Any], moe: dict[str, Any]) -> None:
    assert tiny_config({"model": {"moe": moe}, "parallel": parallel}).parallel.expert_nodes
