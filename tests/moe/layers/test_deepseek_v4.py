"""MoE layers against Hugging Face's DeepSeek-V4: chosen and looked-up experts, clamped activations, shared expert."""

from typing import Any

import pytest
import torch

from moe.layers.moe import MoeLayer
from moe.layers.positions import Positions
from moe.layers.router import Routing
from tests.moe.build import ALONE, VOCABULARY, random_ids, small_config

modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

WIDTH, EXPERTS, TOP_K, EXPERT_WIDTH, LIMIT = 32, 16, 4, 24, 0.8
HASHED, CHOSEN = 0, 1


def their_block(layer: int) -> Any:
    from transformers import DeepseekV4Config

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "moe_intermediate_size": EXPERT_WIDTH,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "n_shared_experts": 1,
        "num_hidden_layers": 2,
        "mlp_layer_types": ["hash_moe", "moe"],
    }
    config = DeepseekV4Config(
        **sizes, routed_scaling_factor=1.5, scoring_func="sqrtsoftplus", swiglu_limit=LIMIT, hidden_act="silu"
    )
    config._experts_implementation = "eager"
    return modeling.DeepseekV4SparseMoeBlock(config, layer)


def our_layer(layer: int) -> MoeLayer:
    moe = {
        "first_dense_layers": 0,
        "hash_layers": 1,
        "affinity": "sqrt_softplus",
        "routed_scaling_factor": 1.5,
    }
    config = small_config(moe=moe, activation={"kind": "swiglu_clamp", "limit": LIMIT})
    return MoeLayer(config, ALONE, hash_layer=layer if config.is_hash_layer(layer) else None)


def pairs(ours: MoeLayer, theirs: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Our parameters and views of theirs that hold the same numbers."""
    assert ours.shared is not None
    gate_up, shared = ours.shared.gate_up.weight, theirs.shared_experts
    return [
        (ours.router.weight, theirs.gate.weight),
        (ours.experts.w_up, theirs.experts.gate_up_proj),
        (ours.experts.w_down, theirs.experts.down_proj),
        (gate_up[:EXPERT_WIDTH], shared.gate_proj.weight),
        (gate_up[EXPERT_WIDTH:], shared.up_proj.weight),
        (ours.shared.down.weight, shared.down_proj.weight),
    ]


def gradient_pairs(ours: MoeLayer, theirs: Any) -> list[tuple[Any, Any]]:
    assert ours.shared is not None
    gate_up, shared = ours.shared.gate_up.weight.grad, theirs.shared_experts
    assert gate_up is not None
    return [
        (ours.router.weight.grad, theirs.gate.weight.grad),
        (ours.experts.w_up.grad, theirs.experts.gate_up_proj.grad),
        (ours.experts.w_down.grad, theirs.experts.down_proj.grad),
        (gate_up[:EXPERT_WIDTH], shared.gate_proj.weight.grad),
        (gate_up[EXPERT_WIDTH:], shared.up_proj.weight.grad),
        (ours.shared.down.weight.grad, shared.down_proj.weight.grad),
    ]


def as_dense(routing: Routing) -> torch.Tensor:
    """Gates [T, E], 0 where an expert was not chosen."""
    return torch.zeros_like(routing.affinity_TE).scatter(1, routing.ids_TK, routing.gates_TK)


@pytest.mark.parametrize("layer", [HASHED, CHOSEN], ids=["hashed", "chosen"])
def test_routing_output_and_gradients_are_those_of_hugging_face(layer: int) -> None:
    ours, theirs = our_layer(layer), their_block(layer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mine, other in pairs(ours, theirs):
            other.copy_(mine.normal_(0.0, 0.3, generator=generator))
        ours.router.biases.normal_(0.0, 0.5, generator=generator)
        if ours.hash_choice is not None:
            theirs.gate.tid2eid.copy_(ours.hash_choice.experts_VK)
        else:
            theirs.gate.e_score_correction_bias.copy_(ours.router.expert_bias_E)
    assert theirs.is_hash == (layer == HASHED)
    ids_BS = random_ids(4, 25)
    x_BSD = torch.randn(4, 25, WIDTH, generator=generator)
    x_ours, x_theirs = x_BSD.clone().requires_grad_(), x_BSD.clone().requires_grad_()
    y_ours, routing = ours(x_ours, Positions(ids_BS))
    y_theirs = theirs(x_theirs, ids_BS)

    inputs = (x_theirs, ids_BS) if layer == HASHED else (x_theirs,)
    _, gates_TK, ids_TK = theirs.gate(*inputs)
    dense = torch.zeros_like(routing.affinity_TE).scatter(1, ids_TK, gates_TK)
    assert torch.equal(as_dense(routing) > 0, dense > 0)
    torch.testing.assert_close(as_dense(routing), dense)

    up_PF = x_BSD.flatten(0, 1) @ ours.experts.w_up[0].t()
    assert (up_PF.abs() > LIMIT).float().mean() > 0.2, "the clamp acts"
    torch.testing.assert_close(y_ours, y_theirs, rtol=1e-4, atol=1e-5)
    dy_BSD = torch.randn(y_ours.shape, generator=generator)
    y_ours.backward(dy_BSD)
    y_theirs.backward(dy_BSD)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=1e-4, atol=1e-5)
    for mine, other in gradient_pairs(ours, theirs):
        assert other.norm() > 0
        assert (mine - other).norm() <= 1e-5 * other.norm()
