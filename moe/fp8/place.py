"""Which products of a model are in FP8."""

from moe.config.fp8 import DeepseekV3Fp8Config
from moe.fp8.products import Fp8Products
from moe.fp8.tally import Tally
from moe.fp8.wire import Fp8Rows
from moe.layers.attention import Attention
from moe.layers.ffn import FeedForward
from moe.layers.linear import Linear
from moe.layers.moe import MoeLayer
from moe.model import Transformer
from moe.parallel import Ranks


def use_fp8(model: Transformer, config: DeepseekV3Fp8Config, ranks: Ranks) -> Tally:
    """Put FP8 products into attention's projections, feed-forwards, experts and the projection of MTP.

    Listed rather than all but some: what else multiplies by a matrix stays as it is. Returns where all of them count.
    """
    tally = Tally(ranks.device)
    dense = Fp8Products(config, tally, ranks.world)
    for module in model.modules():
        if isinstance(module, Attention | FeedForward):
            for linear in module.modules():
                if isinstance(linear, Linear):
                    linear.products = dense
    if model.mtp is not None:
        model.mtp.project.products = dense
    for layer in model.moe_layers():
        _use_in_experts(layer, config, tally, ranks)
    return tally


def _use_in_experts(layer: MoeLayer, config: DeepseekV3Fp8Config, tally: Tally, ranks: Ranks) -> None:
    layer.experts.up_products = Fp8Products(config, tally, ranks.replicas, dispatched=config.dispatch)
    layer.experts.down_products = Fp8Products(config, tally, ranks.replicas)
    if config.dispatch:
        layer.row_codec = Fp8Rows(tally)
