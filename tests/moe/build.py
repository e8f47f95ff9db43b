"""Small models with weights large enough that a difference shows."""

from typing import Any

import torch

from moe.config.model import ModelConfig
from moe.layers.positions import Positions
from moe.model import Transformer
from moe.parallel import Ranks

ALONE = Ranks(torch.device("cpu"))
VOCABULARY = 96


def small_config(**changes: Any) -> ModelConfig:
    """Three layers, the first dense. A dictionary changes the keys that it names, one with a ``kind`` all of them."""
    tree: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 3,
        "intermediate_size": 48,
        "attention": {
            "kind": "mla",
            "num_heads": 2,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
        },
        "moe": {"num_experts": 16, "top_k": 4, "num_shared_experts": 1, "expert_size": 24, "first_dense_layers": 1},
    }
    for key, value in changes.items():
        merges = isinstance(value, dict) and "kind" not in value
        tree[key] = tree.get(key, {}) | value if merges else value
    return ModelConfig.model_validate(tree)


def build_model(
    config: ModelConfig, dtype: torch.dtype = torch.float32, bias: tuple[float, float] = (-0.1, 0.1)
) -> Transformer:
    """A model whose matrices are N(0, 0.1), norm gains N(1, 0.1) and expert biases uniform in ``bias``."""
    generator = torch.Generator().manual_seed(0)
    model = Transformer(config, ALONE, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.1, generator=generator)
            else:
                parameter.normal_(0.0, 0.1, generator=generator)
        for layer in model.moe_layers():
            layer.router.biases.uniform_(*bias, generator=generator)
    return model


def random_ids(sequences: int, length: int, seed: int = 1) -> torch.Tensor:
    """Token ids [sequences, length]."""
    return torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def positions_of(x_BSD: torch.Tensor) -> Positions:
    """Positions without padding, all of token 0, for vectors [B, S, D]."""
    return Positions(torch.zeros(x_BSD.shape[:2], dtype=torch.int64))
