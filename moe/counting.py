"""How many parameters a model has, how many of them a token meets, and what training on a token costs."""

from dataclasses import dataclass

import torch

from moe.config.model import MhaConfig, MlaConfig, ModelConfig, MtpConfig
from moe.config.residual import PlainResidualConfig
from moe.model import Transformer
from moe.parallel import Ranks


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters. Expert biases are not counted: no gradient reaches them."""

    total: int
    active: int
    """All but the routed experts that a token does not pass; where their number varies, at its intended mean."""
    active_without_embedding: int
    """``active`` less the input embedding, which is looked up rather than multiplied."""


def _count(config: ModelConfig) -> ParameterCount:
    meta = torch.device("meta")
    with meta:
        model = Transformer(config, Ranks(meta))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    idle = round(routed // config.moe.num_experts * (config.moe.num_experts - config.moe.mean_experts)) if routed else 0
    return ParameterCount(total, total - idle, total - idle - sizes["embed.weight"])


def count_parameters(config: ModelConfig) -> ParameterCount:
    """The model's parameters without multi-token prediction, as models are compared; takes no memory.

    Raises:
        ValueError: ``config.vocab_size`` is not set.
    """
    return _count(config.model_copy(update={"mtp": MtpConfig(depth=0)}))


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of forward and backward per token, multi-token prediction included.

    6 for every active parameter that multiplies the token: a multiplication and an addition, forward and twice
    backward (arXiv 2001.08361, section 2.1). A token attends to half of the sequence on average, so the products of
    queries with keys and of weights with values cost 6 * length/2 * heads * (query width + value width) per layer.
    Several residual streams are combined by factors that are no parameters, and each is projected for multi-token
    prediction.

    Raises:
        ValueError: ``config.vocab_size`` is not set.
    """
    parameters = _count(config).active_without_embedding
    parameters += config.mtp.depth * config.hidden_size * (config.vocab_size or 0)  # the head is used once more
    per_layer = 3 * sequence_length * _attention_width(config.attention)
    return 6 * (parameters + _stream_products(config)) + (config.num_layers + config.mtp.depth) * per_layer


def _stream_products(config: ModelConfig) -> int:
    """Multiplications of a forward that several residual streams add, those by parameters left out."""
    if isinstance(config.residual, PlainResidualConfig):
        return 0
    n, depth = config.residual.streams, config.mtp.depth
    sub_layers, collapses = 2 * (config.num_layers + depth), 1 + depth
    widths = sub_layers * (n * n + 2 * n) + collapses * n + depth * (n - 1) * 2 * config.hidden_size
    return widths * config.hidden_size


def _attention_width(attention: MlaConfig | MhaConfig) -> int:
    """Widths of a query and a value, over all heads."""
    if isinstance(attention, MhaConfig):
        return attention.num_heads * 2 * attention.head_dim
    return attention.num_heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim)
