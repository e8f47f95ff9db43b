"""A bias for each class of documents: routing by one's own, and updates from one's own load."""

from typing import Any

import pytest
import torch

from moe.config.model import MoeConfig
from moe.layers.router import Router
from moe.stability.balance import BALANCE
from moe.stability.families import build_techniques
from moe.stability.technique import StepLoad, Technique
from moe.trainer import Trainer
from tests.moe.build import ALONE
from tests.moe.tiny import MTP, batches_of, tiny_config, tiny_trainer

CLASSES = 3
WIDTH, EXPERTS, TOP_K = 16, 8, 2


def router_of(classes: int) -> Router:
    router = Router(WIDTH, MoeConfig(num_experts=EXPERTS, top_k=TOP_K, bias_domains=classes))
    with torch.no_grad():
        router.weight.normal_(0.0, 0.4, generator=torch.Generator().manual_seed(0))
    return router


def tokens(count: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors, classes (the last is rare), and which are real."""
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(count, WIDTH, generator=generator) + 0.5
    domains_T = torch.multinomial(torch.tensor([0.6, 0.35, 0.05]), count, True, generator=generator)
    return x_TD, domains_T, torch.rand(count, generator=generator) < 0.8


def test_tokens_are_routed_by_the_bias_of_their_class_and_counted_by_class() -> None:
    router, (x_TD, domains_T, real_T) = router_of(CLASSES), tokens()
    router.biases.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
    routing = router(x_TD, real_T, None, domains_T)
    assert routing.load_CE is not None
    for number in range(CLASSES):
        alone = router_of(1)
        alone.expert_bias_E.copy_(router.expert_bias_CE[number])
        rows = domains_T == number
        expected = alone(x_TD[rows], real_T[rows])
        assert torch.equal(routing.ids_TK[rows], expected.ids_TK)
        assert torch.equal(routing.gates_TK[rows], expected.gates_TK)
        assert torch.equal(routing.load_CE[number], expected.load_E)
    assert torch.equal(routing.load_CE.sum(dim=0), routing.load_E)
    assert len({tuple(row) for row in routing.load_CE.tolist()}) == CLASSES


def test_tokens_without_a_class_are_of_class_0() -> None:
    router, (x_TD, _, _) = router_of(CLASSES), tokens()
    router.biases.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
    without, zeros = router(x_TD), router(x_TD, None, None, torch.zeros(len(x_TD), dtype=torch.int64))
    assert torch.equal(without.ids_TK, zeros.ids_TK)
    assert torch.equal(without.load_CE, zeros.load_CE)
    assert not without.load_CE[1:].any()


def test_with_one_class_the_bias_keeps_its_name_and_classes_change_nothing() -> None:
    router, (x_TD, domains_T, _) = router_of(1), tokens()
    assert [name for name, _ in router.named_buffers()] == ["expert_bias_E"]
    assert router.expert_bias_E.shape == (EXPERTS,)
    routing = router(x_TD, None, None, domains_T)
    assert routing.load_CE is None
    assert torch.equal(routing.ids_TK, router(x_TD).ids_TK)
    assert [name for name, _ in router_of(2).named_buffers()] == ["expert_bias_CE"]


def updated(rule: dict[str, Any], classes: int, domains_T: torch.Tensor, rows: torch.Tensor, steps: int) -> Any:
    """The biases after some steps on the tokens ``rows``, in two micro-batches with padding."""
    config = tiny_config({"stability": {"balance": rule}}, {"model": {"num_layers": 2, "moe": {"top_k": TOP_K}}})
    model = config.model.model_copy(update={"moe": MoeConfig(num_experts=EXPERTS, top_k=TOP_K, bias_domains=classes)})
    technique: Technique = build_techniques(config.stability, model, ALONE)["balance"]
    router, (x_TD, _, real_T) = router_of(classes), tokens()
    moment = Trainer(config, ALONE, batches_of(config, 0)).timeline.at(3)
    for _ in range(steps):
        technique.before_step(moment)
        load_E, load_CE = torch.zeros(EXPERTS).long(), torch.zeros(classes, EXPERTS).long()
        for part in rows.nonzero().flatten().chunk(2):
            routing = router(x_TD[part], real_T[part], None, domains_T[part])
            technique.after_forward([router], [routing])
            load_E += routing.load_E
            load_CE += routing.load_CE if routing.load_CE is not None else 0
        load = StepLoad(load_E.unsqueeze(0), load_CE.unsqueeze(0) if classes > 1 else None)
        technique.after_step([router], load, moment)
    return router.biases


# The rules of varying numbers of experts are refused with classes of documents.
RULES = {kind.model_fields["kind"].default for kind in BALANCE} - {"none", "budget", "threshold"}


@pytest.mark.parametrize("kind", sorted(RULES))
def test_each_class_moves_as_if_it_were_alone(kind: str) -> None:
    """The bias of a class is that of a router which saw the tokens of that class only."""
    _, domains_T, _ = tokens()
    together = updated({"kind": kind}, CLASSES, domains_T, torch.ones_like(domains_T, dtype=torch.bool), 4)
    for number in range(CLASSES):
        alone = updated({"kind": kind}, 1, torch.zeros_like(domains_T), domains_T == number, 4)
        assert alone.any()
        assert torch.equal(together[number], alone[0]), (kind, number)


def test_the_trainer_moves_each_class_by_the_load_of_its_own_tokens() -> None:
    """The sign rule in plain loops over what was routed, two layers that choose and one that does not."""
    changes = {"model": {"num_layers": 3, "moe": {"bias_domains": CLASSES, "hash_layers": 1, "top_k": 3}}}
    trainer = tiny_trainer(tiny_config(MTP, changes, {"data": {"micro_batch_size": 4}}), (0,))
    rate = 1e-2
    counts = [[[0] * EXPERTS for _ in range(CLASSES)] for _ in trainer.routers]
    for batch in batches_of(trainer.config, 0, (0,))(0):
        assert batch.domains_BL is not None
        domains = batch.domains_BL[:, :16].flatten().tolist()
        for layer, routing in enumerate(trainer.model(batch).routings):
            assert routing.real_T is not None
            for ids, domain, real in zip(routing.ids_TK.tolist(), domains, routing.real_T.tolist(), strict=True):
                for expert in ids if real else ():
                    counts[layer][domain][expert] += 1
    report = trainer.step()
    for layer, router in enumerate(trainer.routers):
        for number, load in enumerate(counts[layer]):
            mean = sum(load) / EXPERTS
            signs = [(mean > n) - (mean < n) for n in load]
            wanted = [0.0 if layer == 0 else rate * (s - sum(signs) / EXPERTS) for s in signs]
            assert router.biases[number].tolist() == pytest.approx(wanted, abs=1e-8), (layer, number)
    worst = max(max(load) / (sum(load) / EXPERTS) - 1 for layer in counts[1:] for load in layer)
    assert report.metrics["moe/max_vio_domain_worst"] == pytest.approx(worst)
    whole = [[sum(column) for column in zip(*layer, strict=True)] for layer in counts]
    assert report.layer_max_vio == pytest.approx([max(load) / (sum(load) / EXPERTS) - 1 for load in whole])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"moe": {"num_experts": 0, "bias_domains": 2}}}, r"bias_domains \(2\) has no effect"),
        (
            {"model": {"moe": {"bias_domains": 2}}, "stability": {"balance": {"kind": "none"}}},
            r"model.moe.bias_domains \(2\) has no effect, since stability.balance.kind is none",
        ),
        ({"model": {"moe": {"num_experts": 0, "hash_layers": 1}}}, r"hash_layers \(1\) has no effect"),
        ({"model": {"moe": {"hash_layers": 3}}}, r"moe.hash_layers \(3\) is more than the 2 layers with experts"),
        (
            {"model": {"moe": {"hash_layers": 2}}, "stability": {"balance": {"kind": "quantile"}}},
            r"stability.balance.kind is quantile, but model.moe.hash_layers \(2\) leaves no layer that chooses",
        ),
        (
            {"model": {"moe": {"hash_layers": 2}}, "stability": {"balance_loss": {"kind": "batch"}}},
            r"stability.balance_loss.kind is batch, but model.moe.hash_layers \(2\)",
        ),
        ({"model": {"moe": {"hash_layers": 2, "bias_domains": 2}}}, "model.moe.bias_domains is above 1, but"),
        ({"model": {"moe": {"group_score": "unbiased"}}}, "group_score=unbiased has no effect"),
    ],
)
def test_what_has_no_effect_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_config(changes)
