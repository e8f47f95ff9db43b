"""Attention, rotary position and norm against plain formulas in fp64."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from moe.config.model import MhaConfig, MlaConfig
from moe.layers.attention import build_attention
from moe.layers.norm import RMSNorm
from moe.layers.rotary import rotary_turns, rotate
from tests.moe.build import small_config

SEQUENCES, POSITIONS, WIDTH = 2, 9, 32
THETA, EPS = 10000.0, 1e-6

MLA = {"kind": "mla", "num_heads": 3, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6}
MLA_CASES = {
    "narrow value": MLA | {"v_head_dim": 10},
    "equal widths": MLA | {"v_head_dim": 14},
    "wide value": MLA | {"v_head_dim": 20},
    "compressed queries": MLA | {"v_head_dim": 10, "q_lora_rank": 12},
    "normed heads": MLA | {"v_head_dim": 10, "q_lora_rank": 12, "qk_norm": True},
    "scaled latents": MLA | {"v_head_dim": 10, "q_lora_rank": 12, "scale_latents": True},
    "scaled latent of keys and values alone": MLA | {"v_head_dim": 10, "scale_latents": True},
}


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    """A vector's neighbouring pairs as complex numbers, each turned by its angle."""
    angle = torch.tensor([position * THETA ** (-2 * i / len(x)) for i in range(len(x) // 2)], dtype=torch.float64)
    return torch.view_as_real(
        torch.view_as_complex(x.view(-1, 2)) * torch.polar(torch.ones_like(angle), angle)
    ).flatten()


def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x / ((x * x).sum() / len(x) + EPS).sqrt() * gain


def attended(queries: list[torch.Tensor], keys: list[torch.Tensor], values: list[torch.Tensor]) -> list[torch.Tensor]:
    """One head of one sequence, position by position."""
    rows = []
    for s, query in enumerate(queries):
        scores = torch.stack([query @ key for key in keys[: s + 1]]) / math.sqrt(len(query))
        rows.append(sum((w * v for w, v in zip(scores.softmax(0), values, strict=False)), torch.zeros_like(values[0])))
    return rows


def plain_mla(x_SD: torch.Tensor, w: Mapping[str, torch.Tensor], c: MlaConfig) -> torch.Tensor:
    nope, rope, value, rank = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
    scale_q, scale_kv = 1.0, 1.0
    if c.scale_latents:
        scale_q, scale_kv = math.sqrt(len(x_SD[0]) / (c.q_lora_rank or 1)), math.sqrt(len(x_SD[0]) / rank)
    heads: list[list[torch.Tensor]] = []
    for head in range(c.num_heads):
        queries, keys, values = [], [], []
        for position, x in enumerate(x_SD):
            if c.q_lora_rank is None:
                query = w["q_proj.weight"] @ x
            else:
                latent = scale_q * normed(w["q_proj.0.weight"] @ x, w["q_proj.1.weight"])
                query = w["q_proj.2.weight"] @ latent
            query = query[head * (nope + rope) :][: nope + rope]
            down = w["kv_down.weight"] @ x
            up = w["kv_up.weight"] @ (scale_kv * normed(down[:rank], w["kv_norm.weight"]))
            up = up[head * (nope + value) :][: nope + value]
            key = torch.cat((up[:nope], down[rank:]))
            if c.qk_norm:
                query, key = normed(query, w["q_norm.weight"]), normed(key, w["k_norm.weight"])
            queries.append(torch.cat((query[:nope], turned(query[nope:], position))))
            keys.append(torch.cat((key[:nope], turned(key[nope:], position))))
            values.append(up[nope:])
        heads.append(attended(queries, keys, values))
    return torch.stack([w["out_proj.weight"] @ torch.cat(parts) for parts in zip(*heads, strict=True)])


def plain_mha(x_SD: torch.Tensor, w: Mapping[str, torch.Tensor], c: MhaConfig) -> torch.Tensor:
    heads = []
    for head in range(c.num_heads):
        rows = slice(head * c.head_dim, (head + 1) * c.head_dim)
        q, k, v = (x_SD @ w[f"{name}_proj.weight"][rows].T for name in "qkv")
        if c.qk_norm:
            q = torch.stack([normed(row, w["q_norm.weight"]) for row in q])
            k = torch.stack([normed(row, w["k_norm.weight"]) for row in k])
        queries, keys = ([turned(row.contiguous(), s) for s, row in enumerate(m)] for m in (q, k))
        heads.append(attended(queries, keys, list(v)))
    return torch.stack([w["out_proj.weight"] @ torch.cat(parts) for parts in zip(*heads, strict=True)])


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3, generator=generator)
    return module


def compare(attention: nn.Module, plain: torch.Tensor, x: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> None:
    """Output and every gradient, through a fixed random functional."""
    functional = torch.randn(plain.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    leaf = x.detach().float().requires_grad_()
    y = attention(leaf)
    torch.testing.assert_close(y.double(), plain, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad((plain * functional).sum(), [x, *weights.values()])
    (y * functional.float()).sum().backward()
    found = [leaf.grad, *(p.grad for p in attention.parameters())]
    for gradient, exact in zip(found, expected, strict=True):
        assert gradient is not None
        assert (gradient - exact).norm() <= 1e-5 * exact.norm()


def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(SEQUENCES, POSITIONS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("fields", MLA_CASES.values(), ids=MLA_CASES.keys())
def test_latent_attention_is_the_papers(fields: dict[str, object]) -> None:
    config = small_config(attention=fields)
    assert isinstance(config.attention, MlaConfig)
    attention, x = filled(build_attention(config)), inputs()
    weights = {name: p.detach().double().requires_grad_() for name, p in attention.named_parameters()}
    plain = torch.stack([plain_mla(sequence, weights, config.attention) for sequence in x])
    compare(attention, plain, x, weights)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_multi_head_attention_is_the_plain_one(qk_norm: bool) -> None:
    config = small_config(attention={"kind": "mha", "num_heads": 3, "head_dim": 10, "qk_norm": qk_norm})
    assert isinstance(config.attention, MhaConfig)
    attention, x = filled(build_attention(config)), inputs()
    weights = {name: p.detach().double().requires_grad_() for name, p in attention.named_parameters()}
    plain = torch.stack([plain_mha(sequence, weights, config.attention) for sequence in x])
    compare(attention, plain, x, weights)


@pytest.mark.parametrize("fields", [MLA | {"q_lora_rank": 12}, {"kind": "mha", "num_heads": 3, "head_dim": 14}])
def test_normed_heads_bound_the_logits_whatever_the_weights(fields: dict[str, object]) -> None:
    largest = {}
    for qk_norm in (False, True):
        attention = build_attention(small_config(attention=fields | {"qk_norm": qk_norm}))
        with torch.no_grad():
            for parameter in attention.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 30.0, generator=torch.Generator().manual_seed(1))
            q, k, _ = attention.project(inputs().detach().float())
        largest[qk_norm] = float((q @ k.transpose(-1, -2)).abs().max()) / math.sqrt(q.shape[-1])
    assert largest[False] > 100
    assert largest[True] <= math.sqrt(14) * (1 + 1e-5)


def test_scaled_latents_are_those_of_longcat_flash() -> None:
    theirs = pytest.importorskip("transformers.models.longcat_flash.modeling_longcat_flash")
    settings = pytest.importorskip("transformers").LongcatFlashConfig(
        hidden_size=WIDTH,
        num_attention_heads=3,
        q_lora_rank=12,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=6,
        head_dim=6,
        v_head_dim=10,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    settings._attn_implementation = "eager"
    reference = theirs.LongcatFlashMLA(settings, 0)
    fields = MLA | {"v_head_dim": 10, "q_lora_rank": 12, "scale_latents": True}
    attention = filled(build_attention(small_config(attention=fields)))
    names = {
        "q_proj.0": "q_a_proj",
        "q_proj.1": "q_a_layernorm",
        "q_proj.2": "q_b_proj",
        "kv_down": "kv_a_proj_with_mqa",
        "kv_norm": "kv_a_layernorm",
        "kv_up": "kv_b_proj",
        "out_proj": "o_proj",
    }
    weights = {name.removesuffix(".weight"): p.detach() for name, p in attention.named_parameters()}
    reference.load_state_dict({f"{names[name]}.weight": tensor for name, tensor in weights.items()})
    x = inputs().detach().float()
    positions = torch.arange(POSITIONS).expand(SEQUENCES, -1)
    turns = theirs.LongcatFlashRotaryEmbedding(settings)(x, positions)
    mask = torch.full((POSITIONS, POSITIONS), float("-inf")).triu(1).expand(SEQUENCES, 1, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(attention(x), reference(x, turns, mask)[0], rtol=1e-5, atol=1e-5)


def test_queries_are_either_scaled_or_normed() -> None:
    with pytest.raises(ValueError, match="scale_latents does nothing to queries that qk_norm norms"):
        MlaConfig(scale_latents=True, qk_norm=True)


def test_rotation_is_exact_to_fp32_at_far_positions() -> None:
    x = torch.randn(1, 1, 40000, 16, generator=torch.Generator().manual_seed(1))
    y = rotate(x, rotary_turns(40000, 16, THETA, torch.device("cpu")))
    for position in (0, 1, 7, 1000, 39999):
        expected = turned(x[0, 0, position].double(), position)
        torch.testing.assert_close(y[0, 0, position].double(), expected, rtol=0, atol=2e-6)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(16, generator=generator).expand(1, 1, 300, 16) for _ in range(2))
    turns = rotary_turns(300, 16, THETA, torch.device("cpu"))
    products = rotate(q, turns)[0, 0] @ rotate(k, turns)[0, 0].T
    torch.testing.assert_close(products[5:, 5:], products[:-5, :-5], rtol=1e-5, atol=1e-5)
    assert (products[0, 1:] - products[0, :-1]).abs().max() > 0.1


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_rms_norm_is_the_formula(scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    norm = RMSNorm(20, EPS)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.3, generator=generator)
    x = (torch.randn(3, 5, 20, generator=generator) * scale).requires_grad_()
    functional = torch.randn(3, 5, 20, generator=generator)
    exact_x, exact_gain = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = exact_x / (exact_x.square().mean(-1, keepdim=True) + EPS).sqrt() * exact_gain
    y = norm(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    (y * functional).sum().backward()
    (expected * functional).sum().backward()
    for found, exact in ((x.grad, exact_x.grad), (norm.weight.grad, exact_gain.grad)):
        assert found is not None
        assert exact is not None
        assert (found - exact).norm() <= 1e-5 * exact.norm()


def test_rms_norm_of_bf16_is_computed_in_fp32() -> None:
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(4)).bfloat16()
    norm = RMSNorm(512, EPS)
    y = norm(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, norm(x.float()).bfloat16())
    assert norm(torch.zeros(2, 512)).abs().max() == 0
