"""The balance losses against DeepSeek-V3's equations 17 to 20 in plain Python, per sequence and over a batch."""

import math
from dataclasses import replace

import pytest
import torch

from moe.batch import Batch
from moe.config.balance_loss import BatchBalanceLossConfig, SequenceBalanceLossConfig
from moe.config.model import ModelConfig, MoeConfig
from moe.layers.router import Router, Routing
from moe.model import ModelOutput
from moe.schedule import Moment
from moe.stability.balance_loss import BatchBalanceLoss, SequenceBalanceLoss
from moe.stability.technique import BatchCounts
from tests.moe.build import ALONE
from tests.moe.stability.moments import START

ALPHA = 0.25
EXPERTS, TOP_K, WIDTH = 6, 2, 5
SEQUENCES, LENGTH = 3, 7
PADDED = torch.arange(LENGTH) < torch.tensor([[LENGTH], [4], [0]])


def model(affinity: str = "sigmoid") -> ModelConfig:
    moe = MoeConfig(num_experts=EXPERTS, top_k=TOP_K, affinity=affinity)  # type: ignore[arg-type]
    return ModelConfig(moe=moe, vocab_size=10)


def setting(affinity: str, layers: int = 2) -> tuple[list[Router], torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    routers = [Router(WIDTH, model(affinity).moe) for _ in range(layers)]
    for router in routers:
        torch.nn.init.normal_(router.weight, generator=generator)
        router.expert_bias_E.normal_(generator=generator)  # the loss must not see it
    return routers, torch.randn(SEQUENCES * LENGTH, WIDTH, generator=generator)


def term(
    routings: list[Routing],
    sequences: int = SEQUENCES,
    affinity: str = "sigmoid",
    whole: int | None = None,
    moment: Moment = START,
) -> torch.Tensor:
    """The term of one micro-batch of a global batch of ``whole`` sequences."""
    technique = SequenceBalanceLoss(SequenceBalanceLossConfig(coefficient=ALPHA), model(affinity), ALONE)
    batch = Batch(torch.zeros(sequences, 2, dtype=torch.int64))
    counts = BatchCounts(1, 1, whole or sequences, 1)
    return technique.loss_terms(batch, ModelOutput(torch.empty(0), None, routings), counts, moment)["balance_loss"]


def plain_loss(weights: list[list[list[float]]], x: list[list[float]], real: list[list[bool]], affinity: str) -> float:
    """Equations 17-20 of arXiv 2412.19437, averaged over sequences, summed over layers."""
    total = 0.0
    for weight in weights:
        for sequence in range(SEQUENCES):
            rows = [x[sequence * LENGTH + t] for t in range(LENGTH) if real[sequence][t]]
            f, p = [0.0] * EXPERTS, [0.0] * EXPERTS
            for row in rows:
                logits = [sum(w * v for w, v in zip(expert, row, strict=True)) for expert in weight]
                if affinity == "sigmoid":
                    s = [1 / (1 + math.exp(-z)) for z in logits]
                elif affinity == "sqrt_softplus":
                    s = [math.sqrt(math.log1p(math.exp(z))) for z in logits]
                else:
                    s = [math.exp(z) / sum(math.exp(other) for other in logits) for z in logits]
                top = sorted(range(EXPERTS), key=lambda e: -s[e])[:TOP_K]
                for expert in range(EXPERTS):
                    f[expert] += EXPERTS / (TOP_K * len(rows)) * (expert in top)
                    p[expert] += s[expert] / sum(s) / len(rows)
            total += sum(a * b for a, b in zip(f, p, strict=True))
    return ALPHA * total / SEQUENCES


@pytest.mark.parametrize("affinity", ["sigmoid", "softmax", "sqrt_softplus"])
@pytest.mark.parametrize("real_BS", [None, PADDED], ids=["full", "padded"])
def test_loss_and_gradient_are_those_of_the_equations(affinity: str, real_BS: torch.Tensor | None) -> None:
    routers, x_TD = setting(affinity)
    real = torch.ones_like(PADDED) if real_BS is None else real_BS
    weights, x = [r.weight.double().tolist() for r in routers], x_TD.double().tolist()

    def plain() -> float:
        return plain_loss(weights, x, real.tolist(), affinity)

    real_T = None if real_BS is None else real_BS.flatten()
    got = term([router(x_TD, real_T) for router in routers], affinity=affinity)
    assert got.item() == pytest.approx(plain(), rel=1e-5)
    got.backward()
    for layer, router in enumerate(routers):
        assert router.weight.grad is not None
        for expert, column in [(0, 0), (2, 3), (5, 4)]:
            before, values = weights[layer][expert][column], []
            for step in (1e-5, -1e-5):
                weights[layer][expert][column] = before + step
                values.append(plain())
            weights[layer][expert][column] = before
            difference = (values[0] - values[1]) / 2e-5
            assert router.weight.grad[expert, column].item() == pytest.approx(difference, rel=1e-3, abs=1e-6)


def test_perfect_balance_costs_alpha_per_layer() -> None:
    # Token t prefers experts t and t+1 (mod E): over E tokens every expert is chosen as often as any other.
    logits_TE = torch.full((EXPERTS, EXPERTS), -1.0)
    for t in range(EXPERTS):
        logits_TE[t, t] = logits_TE[t, (t + 1) % EXPERTS] = 1.0
    routing = routing_of(logits_TE)
    assert term([routing, routing, routing], sequences=1).item() == pytest.approx(3 * ALPHA, rel=1e-6)


def routing_of(logits_TE: torch.Tensor) -> Routing:
    ids = torch.zeros(logits_TE.shape[0], TOP_K, dtype=torch.int64)
    return Routing(logits_TE, logits_TE.sigmoid(), ids, ids.float(), torch.zeros(EXPERTS, dtype=torch.int64), None)


@pytest.mark.parametrize("shift", [-30.0, -90.0])
def test_driving_all_affinities_to_zero_hides_nothing(shift: float) -> None:
    """Far down, sigmoid is the exponential, so the normalised affinities tend to a softmax and the loss stays."""
    generator = torch.Generator().manual_seed(5)
    logits_TE = torch.randn(12, EXPERTS, generator=generator)
    logits_TE[:, 0] += 4.0
    low = (logits_TE + shift).requires_grad_()
    got = term([routing_of(low)], sequences=1)
    share_TE = logits_TE.double().softmax(dim=1)
    chosen_TE = torch.zeros_like(share_TE).scatter_(1, logits_TE.topk(TOP_K, dim=1).indices, 1.0)
    expected = ALPHA * EXPERTS / TOP_K * (chosen_TE.mean(0) * share_TE.mean(0)).sum()
    assert got.item() == pytest.approx(expected.item(), rel=1e-4)
    assert got.item() > 1.5 * ALPHA
    [gradient] = torch.autograd.grad(got, low)
    assert gradient[:, 0].min() > 0, "the favoured expert is not pushed down"


def test_shares_of_micro_batches_add_up_to_the_mean_over_the_global_batch() -> None:
    routers, x_TD = setting("sigmoid")
    whole = term([router(x_TD, PADDED.flatten()) for router in routers])
    parts = 0.0
    for sequence in range(SEQUENCES):
        rows = slice(sequence * LENGTH, (sequence + 1) * LENGTH)
        routings = [router(x_TD[rows], PADDED[sequence]) for router in routers]
        parts += term(routings, 1, whole=SEQUENCES).item()
    assert parts == pytest.approx(whole.item(), rel=1e-6)


def test_a_stage_may_replace_the_coefficient() -> None:
    routers, x_TD = setting("sigmoid")
    routings = [router(x_TD) for router in routers]
    doubled = term(routings, moment=replace(START, balance_coefficient=2 * ALPHA))
    assert doubled.item() == pytest.approx(2 * term(routings).item())


def test_a_dense_model_has_no_balance_loss() -> None:
    technique = SequenceBalanceLoss(SequenceBalanceLossConfig(), model(), ALONE)
    batch = Batch(torch.zeros(1, 2, dtype=torch.int64))
    assert technique.loss_terms(batch, ModelOutput(torch.empty(0), None, []), BatchCounts(1, 1, 1, 1), START) == {}


# ---- over the global batch -------------------------------------------------------------------------------------------


def batch_technique(affinity: str = "sigmoid", layers: int = 2) -> BatchBalanceLoss:
    config = model(affinity).model_copy(update={"num_layers": layers + 1})
    return BatchBalanceLoss(BatchBalanceLossConfig(coefficient=ALPHA), config, ALONE)


def batch_term(
    technique: BatchBalanceLoss, routings: list[Routing], inputs: int, predicted: int = 1, mtp: bool = False
) -> torch.Tensor:
    """The term of one micro-batch of a global batch of ``inputs`` real tokens."""
    batch = Batch(torch.zeros(1, 2, dtype=torch.int64))
    output = ModelOutput(torch.empty(0), torch.empty(0) if mtp else None, routings)
    counts = BatchCounts(predicted, 1, 1, inputs)
    return technique.loss_terms(batch, output, counts, START)["balance_loss"]


Rows = list[list[float]]


def plain_batch_loss(weights: list[Rows], micro_batches: list[Rows], affinity: str) -> float:
    """Equations 17-20 with a whole batch for a sequence; f counts the micro-batches up to the one whose P it meets."""
    total, tokens = 0.0, sum(map(len, micro_batches))
    for weight in weights:
        chosen, seen = [0] * EXPERTS, 0
        for rows in micro_batches:
            shares = [0.0] * EXPERTS
            for row in rows:
                logits = [sum(w * v for w, v in zip(expert, row, strict=True)) for expert in weight]
                if affinity == "sigmoid":
                    s = [1 / (1 + math.exp(-z)) for z in logits]
                elif affinity == "softmax":
                    s = [math.exp(z) for z in logits]
                else:
                    s = [math.sqrt(math.log1p(math.exp(z))) for z in logits]
                for expert in sorted(range(EXPERTS), key=lambda e: -s[e])[:TOP_K]:
                    chosen[expert] += 1
                seen += 1
                shares = [p + a / sum(s) / tokens for p, a in zip(shares, s, strict=True)]
            if seen:
                total += sum(EXPERTS / (TOP_K * seen) * c * p for c, p in zip(chosen, shares, strict=True))
    return ALPHA * total


@pytest.mark.parametrize("affinity", ["sigmoid", "softmax", "sqrt_softplus"])
@pytest.mark.parametrize("cuts", [[21], [7, 14], [3, 0, 11, 7]], ids=str)
def test_the_batch_loss_and_its_gradient_are_those_of_the_equations(affinity: str, cuts: list[int]) -> None:
    """With padding, and f from the counts so far; one of the micro-batches may be empty."""
    routers, x_TD = setting(affinity)
    real_T = PADDED.flatten()
    weights = [r.weight.double().tolist() for r in routers]
    parts = list(zip(x_TD.split(cuts), real_T.split(cuts), strict=True))
    micro_batches = [x[real].double().tolist() for x, real in parts]
    technique = batch_technique(affinity)
    for _ in range(2):  # a second step begins anew
        technique.before_step(START)
        for router in routers:
            router.weight.grad = None
        got = 0.0
        for x, real in parts:
            term = batch_term(technique, [router(x, real) for router in routers], int(real_T.sum()))
            term.backward()
            got += term.item()
    assert got == pytest.approx(plain_batch_loss(weights, micro_batches, affinity), rel=1e-5)
    for layer, router in enumerate(routers):
        assert router.weight.grad is not None
        for expert, column in [(0, 0), (2, 3), (5, 4)]:
            before, values = weights[layer][expert][column], []
            for step in (1e-5, -1e-5):
                weights[layer][expert][column] = before + step
                values.append(plain_batch_loss(weights, micro_batches, affinity))
            weights[layer][expert][column] = before
            difference = (values[0] - values[1]) / 2e-5
            assert router.weight.grad[expert, column].item() == pytest.approx(difference, rel=1e-3, abs=1e-6)


def test_sequences_may_be_uneven_where_the_batch_is_even() -> None:
    """Each sequence keeps to two experts, the batch uses all alike: alpha over the batch, more by sequence."""
    logits_TE = torch.full((3 * 4, EXPERTS), -4.0)
    for sequence in range(3):
        logits_TE[4 * sequence : 4 * sequence + 4, 2 * sequence : 2 * sequence + 2] = 4.0
    routing = routing_of(logits_TE)
    technique = batch_technique()
    technique.before_step(START)
    assert batch_term(technique, [routing, routing], inputs=12).item() == pytest.approx(2 * ALPHA, rel=1e-6)
    assert term([routing, routing]).item() > 4 * ALPHA


def test_the_layer_of_multi_token_prediction_is_a_mean_over_its_own_tokens() -> None:
    routers, x_TD = setting("sigmoid")
    real_T = torch.arange(len(x_TD)) < 9
    alone = batch_technique(layers=1)
    alone.before_step(START)
    expected = batch_term(alone, [routers[0](x_TD)], inputs=21)
    alone.before_step(START)
    expected = expected + batch_term(alone, [routers[1](x_TD[:9])], inputs=9)
    both = batch_technique()
    both.before_step(START)
    got = batch_term(both, [routers[0](x_TD), routers[1](x_TD, real_T)], inputs=21, predicted=9, mtp=True)
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_dense_model_has_no_batch_loss_either() -> None:
    output = ModelOutput(torch.empty(0), None, [])
    batch = Batch(torch.zeros(1, 2, dtype=torch.int64))
    assert batch_technique().loss_terms(batch, output, BatchCounts(1, 1, 1, 1), START) == {}
