"""Where norms stand in a block and behind the routed experts, against plain formulas."""

from typing import Any

import pytest
import torch

from moe.config.model import ModelConfig
from moe.layers.moe import MoeLayer
from moe.model import Block
from tests.moe.build import ALONE, build_model, positions_of, small_config

PLACEMENTS = ["pre", "sandwich", "reordered"]


def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    rows = [row / (sum(float(v) ** 2 for v in row) / len(row) + 1e-6) ** 0.5 * gain for row in x.flatten(0, -2)]
    return torch.stack(rows).view_as(x)


def states(config: ModelConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, 5, config.hidden_size, generator=generator) * 3


def block_of(config: ModelConfig, layer: int) -> Block:
    return build_model(config).blocks()[layer]


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_each_sub_layer_is_normed_where_the_placement_says(placement: str, layer: int) -> None:
    config = small_config(norm_placement=placement)
    block, x = block_of(config, layer), states(config)
    gains = {name: p for name, p in block.named_parameters() if name.endswith("norm.weight") and name.count(".") == 1}
    with torch.no_grad():
        y, _ = block(x, positions_of(x))
        for norm, sub_layer in (("attention", block.attention), ("ffn", lambda x: feed_forward(block, x))):
            out = x if placement == "reordered" else normed(x, gains[f"{norm}_norm.weight"])
            out = sub_layer(out)
            x = x + (out if placement == "pre" else normed(out, gains[f"{norm}_post_norm.weight"]))
    torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)
    assert len(gains) == {"pre": 2, "sandwich": 4, "reordered": 2}[placement]


def feed_forward(block: Block, x: torch.Tensor) -> torch.Tensor:
    y = block.ffn(x, positions_of(x))[0] if isinstance(block.ffn, MoeLayer) else block.ffn(x)
    assert isinstance(y, torch.Tensor)
    return y


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_norms_of_the_multi_token_block_follow_the_placement(placement: str) -> None:
    names = {n for n, _ in build_model(small_config(norm_placement=placement, mtp={"depth": 1})).named_parameters()}
    assert ("mtp.block.ffn_post_norm.weight" in names) == (placement != "pre")
    assert ("mtp.block.attention_norm.weight" in names) == (placement != "reordered")


@pytest.mark.parametrize("shared", [0, 1])
def test_the_routed_sum_is_normed_before_shared_experts_are_added(shared: int) -> None:
    config = small_config(moe={"output_norm": True, "num_shared_experts": shared})
    plain_config = small_config(moe={"output_norm": False, "num_shared_experts": 0})
    layer = block_of(config, 1).ffn
    assert isinstance(layer, MoeLayer)
    plain = MoeLayer(plain_config, ALONE)
    state = {n: t for n, t in layer.state_dict().items() if not n.startswith(("output_norm", "shared"))}
    plain.load_state_dict(state)
    x = states(config)
    with torch.no_grad():
        expected = normed(plain(x, positions_of(x))[0], layer.state_dict()["output_norm.weight"])
        if layer.shared is not None:
            expected = expected + layer.shared(x)
        torch.testing.assert_close(layer(x, positions_of(x))[0], expected, rtol=1e-4, atol=1e-5)


def test_a_start_far_below_the_norms_epsilon_is_not_raised_to_one() -> None:
    """DeepSeek-V3's std of 0.006 at this width: 1 / sqrt(eps) is the most that a norm multiplies by."""
    config = small_config(norm_placement="sandwich")
    block, x = block_of(config, 0), states(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.ones(()) if parameter.dim() == 1 else parameter * 0.06)
        inner = block.ffn(block.ffn_norm(x))
        assert inner.square().mean().sqrt() < 1e-4
        raised = block.ffn_post_norm(inner)
    torch.testing.assert_close(raised, inner * 1e3, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"moe": {"num_experts": 0, "output_norm": True}}, "output_norm norms .* but num_experts is 0"),
        ({"moe": {"output_norm": True, "routed_scaling_factor": 2.5}}, r"routed_scaling_factor \(2.5\) is normed away"),
        (
            {"norm_placement": "sandwich", "init": {"output_scale": "depth"}},
            "init.output_scale=depth is undone by norm_placement=sandwich.*set init.output_scale=none",
        ),
        ({"norm_placement": "reordered", "init": {"output_scale": "depth"}}, "undone by norm_placement=reordered"),
    ],
)
def test_options_that_undo_each_other_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        small_config(**changes)
