"""Identity experts and thresholds: what a layer chooses and gives, against loops and transformers' LongCat-Flash."""

import math
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from moe.batch import Batch
from moe.config.model import ModelConfig, MoeConfig
from moe.init import initialise
from moe.layers.moe import MoeLayer
from moe.layers.router import Routing
from moe.layers.selection import starting_bias
from moe.model import Transformer
from moe.monitors import measure
from tests.moe.build import ALONE, build_model, positions_of, random_ids, small_config

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WIDTH, EXPERTS, IDENTITIES, TOP_K, TOKENS = 12, 6, 4, 3, 60
IDENTITY: dict[str, Any] = {"num_identity_experts": IDENTITIES}
THRESHOLD: dict[str, Any] = {"selection": {"kind": "threshold", "max_experts": 4}}


def layer_of(bias: tuple[float, float] = (-0.2, 0.2), **moe: Any) -> MoeLayer:
    base = {"num_experts": EXPERTS, "top_k": TOP_K, "expert_size": 10, "num_shared_experts": 1}
    config = ModelConfig.model_validate({"hidden_size": WIDTH, "moe": base | moe})
    layer, generator = MoeLayer(config, ALONE), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
        layer.router.expert_bias_E.uniform_(*bias, generator=generator)
    return layer


def inputs() -> torch.Tensor:
    return torch.randn(3, TOKENS // 3, WIDTH, generator=torch.Generator().manual_seed(4))


def affinities(layer: MoeLayer, x_D: torch.Tensor) -> torch.Tensor:
    logits_E = layer.router.weight.double() @ x_D
    return logits_E.sigmoid() if layer.router.config.affinity == "sigmoid" else logits_E.softmax(dim=0)


def chosen(layer: MoeLayer, s_E: torch.Tensor) -> list[int]:
    """Experts of one token, by the words of the papers."""
    c = layer.router.config
    scores = (s_E + layer.router.expert_bias_E.double()).tolist()
    best = sorted(range(len(scores)), key=lambda expert: -scores[expert])
    if c.selection.kind == "threshold":
        return [expert for expert in best if scores[expert] > 0][:4]
    return best[: c.top_k]


def looped(layer: MoeLayer, x_BSD: torch.Tensor) -> torch.Tensor:
    """The layer's output token by token in fp64; differentiable in x and every weight."""
    c, rows = layer.router.config, []
    for x_D in x_BSD.double().flatten(0, 1):
        s_E = affinities(layer, x_D)
        experts = chosen(layer, s_E)
        total = sum((s_E[expert] for expert in experts), torch.zeros((), dtype=torch.float64))
        y_D = torch.zeros(WIDTH, dtype=torch.float64)
        for expert in experts:
            gate = (s_E[expert] / total if c.normalize_gates else s_E[expert]) * c.routed_scaling_factor
            if expert < EXPERTS:
                gate_F, up_F = (layer.experts.w_up[expert].double() @ x_D).chunk(2)
                y_D = y_D + gate * (layer.experts.w_down[expert].double() @ (F.silu(gate_F) * up_F))
            else:
                y_D = y_D + gate * x_D
        if c.output_norm:
            y_D = y_D / (y_D.square().mean() + 1e-6).sqrt() * layer.output_norm.weight.double()  # type: ignore[operator]
        assert layer.shared is not None
        gate_F, up_F = (layer.shared.gate_up.weight.double() @ x_D).chunk(2)
        rows.append(y_D + layer.shared.down.weight.double() @ (F.silu(gate_F) * up_F))
    return torch.stack(rows).view_as(x_BSD)


CASES: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "identity": (IDENTITY, (-0.2, 0.2)),
    "identity, normed": ({**IDENTITY, "output_norm": True}, (-0.2, 0.2)),
    "identity, softmax as it is": (
        {**IDENTITY, "affinity": "softmax", "normalize_gates": False, "routed_scaling_factor": 2.5},
        (-0.05, 0.05),
    ),
    "identity, wide": ({"num_identity_experts": 4, "top_k": 7}, (-0.2, 0.2)),
    "threshold": (THRESHOLD, (-0.9, -0.3)),
    "threshold, softmax as it is": ({**THRESHOLD, "affinity": "softmax", "normalize_gates": False}, (-0.35, -0.02)),
}


@pytest.mark.parametrize(("moe", "bias"), CASES.values(), ids=CASES.keys())
def test_outputs_and_gradients_are_those_of_a_loop(moe: dict[str, Any], bias: tuple[float, float]) -> None:
    layer, x_BSD = layer_of(bias, **moe), inputs().requires_grad_()
    dy_BSD = torch.randn(x_BSD.shape, generator=torch.Generator().manual_seed(5))
    wanted = [x_BSD, *layer.parameters()]
    y_BSD, routing = layer(x_BSD, positions_of(x_BSD))
    numbers = routing.experts_T.tolist()
    assert len(set(numbers)) > 2, "every token has the same number of experts"
    if moe == THRESHOLD:
        assert min(numbers) == 0
        assert max(numbers) == 4
        assert routing.ids_TK.shape[1] == 4
    expected = looped(layer, x_BSD)
    torch.testing.assert_close(y_BSD.double(), expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad((y_BSD * dy_BSD).sum(), wanted)
    for got, want in zip(gradients, torch.autograd.grad((expected * dy_BSD).sum(), wanted), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
        assert got.isfinite().all()


@pytest.mark.parametrize(("moe", "bias"), CASES.values(), ids=CASES.keys())
def test_loads_and_numbers_count_real_tokens(moe: dict[str, Any], bias: tuple[float, float]) -> None:
    layer, x_TD = layer_of(bias, **moe), inputs().flatten(0, 1)
    real_T = torch.arange(TOKENS) % 5 != 0
    routing = layer.router(x_TD, real_T)
    choices = [chosen(layer, affinities(layer, x_D)) for x_D in x_TD.double()]
    real = [choice for choice, is_real in zip(choices, real_T.tolist(), strict=True) if is_real]
    pool = EXPERTS + layer.router.config.num_identity_experts
    assert routing.load_E.tolist() == [sum(expert in choice for choice in real) for expert in range(pool)]
    assert routing.experts_T.tolist() == [sum(expert < EXPERTS for expert in choice) for choice in choices]


def test_a_token_without_experts_passes_the_shared_one_alone() -> None:
    layer, x_BSD = layer_of((-2.0, -1.5), **THRESHOLD), inputs().requires_grad_()
    y_BSD, routing = layer(x_BSD, positions_of(x_BSD))
    assert routing.ids_TK.unique().tolist() == [-1]
    assert routing.load_E.tolist() == [0] * EXPERTS
    assert layer.shared is not None
    assert torch.equal(y_BSD, layer.shared(x_BSD))
    y_BSD.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert not layer.experts.w_up.grad.any()  # type: ignore[union-attr]


def test_a_token_of_identities_alone_comes_back() -> None:
    layer, x_BSD = layer_of(num_identity_experts=4, num_shared_experts=0), inputs()
    with torch.no_grad():
        layer.router.expert_bias_E[:EXPERTS] = -9.0
    y_BSD, routing = layer(x_BSD, positions_of(x_BSD))
    assert not routing.experts_T.any()
    torch.testing.assert_close(y_BSD, x_BSD, rtol=1e-6, atol=1e-6)  # the gates add up to 1


@pytest.mark.parametrize("moe", [IDENTITY, THRESHOLD], ids=["identity", "threshold"])
def test_the_bias_never_enters_a_gate(moe: dict[str, Any]) -> None:
    layer, x_TD = layer_of((-0.6, -0.4), **moe), inputs().flatten(0, 1)
    before = layer.router(x_TD)
    with torch.no_grad():
        layer.router.expert_bias_E += torch.linspace(-0.03, 0.04, len(layer.router.expert_bias_E))
    after = layer.router(x_TD)
    same_T = (before.ids_TK == after.ids_TK).all(dim=1)
    assert 0 < same_T.sum() < TOKENS
    assert torch.equal(before.gates_TK[same_T], after.gates_TK[same_T])


# ---- transformers' LongCat-Flash -------------------------------------------------------------------------------------


def test_a_layer_is_that_of_longcat_flash() -> None:
    longcat = pytest.importorskip("transformers.models.longcat_flash.modeling_longcat_flash")
    from transformers import LongcatFlashConfig

    config = LongcatFlashConfig(
        hidden_size=WIDTH,
        n_routed_experts=EXPERTS,
        zero_expert_num=IDENTITIES,
        moe_topk=TOP_K,
        expert_ffn_hidden_size=10,
        routed_scaling_factor=6.0,
    )
    theirs = longcat.LongcatFlashMoE(config)
    ours = layer_of(
        (-0.05, 0.05),
        **IDENTITY,
        affinity="softmax",
        normalize_gates=False,
        routed_scaling_factor=6.0,
        num_shared_experts=0,
    )
    with torch.no_grad():
        theirs.router.classifier.weight.copy_(ours.router.weight)
        theirs.router.e_score_correction_bias.copy_(ours.router.expert_bias_E)
        # Theirs has weights of no use for identity experts too.
        theirs.experts.gate_up_proj.zero_()[:EXPERTS] = ours.experts.w_up
        theirs.experts.down_proj.copy_(ours.experts.w_down)
    x, y = inputs().requires_grad_(), inputs().requires_grad_()
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    got, routing = ours(x, positions_of(x))
    want = theirs(y)
    _, weights, ids = theirs.router(y)
    assert 0 < (routing.ids_TK >= EXPERTS).sum() < routing.ids_TK.numel()
    by_expert = [torch.zeros(TOKENS, EXPERTS + IDENTITIES).scatter(1, i, g) for i, g in ((ids, weights), pair(routing))]
    torch.testing.assert_close(by_expert[1], by_expert[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (got * dy).sum().backward()
    (want * dy).sum().backward()
    gradients = [
        (x.grad, y.grad),
        (ours.router.weight.grad, theirs.router.classifier.weight.grad),
        (ours.experts.w_up.grad, theirs.experts.gate_up_proj.grad[:EXPERTS]),
        (ours.experts.w_down.grad, theirs.experts.down_proj.grad),
    ]
    for mine, reference in gradients:
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def pair(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    return routing.ids_TK, routing.gates_TK


# ---- where biases start, figures, config -----------------------------------------------------------------------------


@pytest.mark.parametrize("affinity", ["sigmoid", "softmax", "sqrt_softplus"])
@pytest.mark.parametrize("std", [0.006, 0.05])
def test_thresholds_start_where_tokens_take_about_k_experts(affinity: str, std: float) -> None:
    moe = {"num_experts": 64, "top_k": 6, "affinity": affinity, "selection": {"kind": "threshold", "max_experts": 64}}
    config = small_config(hidden_size=256, moe=moe, init={"std": std})
    model = Transformer(config, ALONE)
    initialise(model, config.init, 0, ALONE)
    router = model.moe_layers()[0].router
    assert router.expert_bias_E.tolist() == pytest.approx([starting_bias(config)] * 64)
    x_TD = F.rms_norm(torch.randn(500, 256, generator=torch.Generator().manual_seed(0)), (256,))
    assert router(x_TD).load_E.sum().item() / 500 == pytest.approx(6, rel=0.2)


def test_biases_that_are_no_thresholds_start_at_zero() -> None:
    assert starting_bias(small_config()) == 0.0
    assert starting_bias(small_config(moe={"num_identity_experts": 4})) == 0.0


@pytest.mark.parametrize("moe", [IDENTITY, THRESHOLD], ids=["identity", "threshold"])
def test_health_figures_see_real_experts_alone(moe: dict[str, Any]) -> None:
    model = build_model(small_config(moe={**moe, "top_k": 3}), bias=(-0.55, -0.45))
    found = measure(model, Batch(random_ids(2, 9)), ALONE)
    assert all(math.isfinite(layer.expert_kurtosis) and layer.expert_max > 0 for layer in found.moe)


@pytest.mark.parametrize(
    ("moe", "named"),
    [
        ({"num_identity_experts": 4, "num_groups": 2, "top_groups": 1}, "set top_groups to num_groups"),
        ({"num_identity_experts": 4, "num_experts": 0}, "num_experts is 0"),
        ({"num_identity_experts": 1, "top_k": 7}, "takes every expert"),
        ({"num_identity_experts": 4, "experts_per_token": 3.0}, "above 0 and below 3, got 3.0"),
        ({"num_identity_experts": 2, "experts_per_token": 0.5}, "above 1 and below 3"),
        ({"experts_per_token": 2.0}, "experts_per_token .* no effect"),
        ({"selection": {"kind": "threshold"}, "num_identity_experts": 4}, "set num_identity_experts to 0"),
        ({"selection": {"kind": "threshold"}, "num_groups": 2}, "set top_groups to num_groups"),
        ({"selection": {"kind": "threshold"}, "top_k": 6}, "every expert is always taken"),
        ({"selection": {"kind": "threshold"}, "num_experts": 0}, "set it to top_k"),
        ({"selection": {"kind": "threshold", "max_experts": 3}}, r"max_experts \(3\) must be above top_k \(3\)"),
        ({"selection": {"kind": "threshold", "max_experts": 7}}, "at most num_experts"),
        ({"selection": {"kind": "top_k", "max_experts": 7}}, "max_experts"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(moe: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        MoeConfig.model_validate({"num_experts": EXPERTS, "top_k": TOP_K} | moe)


def test_the_intended_mean_is_the_share_of_an_even_load() -> None:
    longcat = MoeConfig(num_experts=512, num_identity_experts=256, top_k=12)
    assert longcat.mean_experts == 8
    assert longcat.router_outputs == 768
    assert MoeConfig(num_experts=8, num_identity_experts=4, top_k=3, experts_per_token=1.5).mean_experts == 1.5
    assert MoeConfig().mean_experts == MoeConfig().top_k
