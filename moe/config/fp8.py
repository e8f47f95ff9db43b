"""Matrix products in FP8. ``precision.fp8``.

Emulated: operands are rounded to FP8 and multiplied as what they then stand for, so a run shows what FP8 does to
training, and not its speed. No FP8 kernel of a GPU is called.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe.config.base import Config


class NoFp8Config(Config):
    """Matrix products in ``precision.compute``."""

    kind: Literal["none"] = "none"


class DeepseekV3Fp8Config(Config):
    """All three products of a weight in FP8 with fine-grained scales (DeepSeek-V3, arXiv 2412.19437, section 3.3).

    Forward, gradient of the input and gradient of the weight take E4M3 operands (at most 448, 3 bits of mantissa).
    Activations and gradients have a scale for each 128 values along the dimension that is summed over, weights one for
    each block of 128 x 128; all come from the largest value at hand. So it is for attention's projections, dense and
    shared feed-forward, routed experts and the projection of multi-token prediction. Embedding, head, router, norms
    and the attention product stay in ``precision.compute`` or fp32 as before; weights and their gradients are fp32.

    The options other than ``scales`` and ``dispatch`` are there to show what the recipe's parts are for.
    """

    kind: Literal["deepseek_v3"] = "deepseek_v3"
    scaling: Literal["tiles", "tensor"] = "tiles"
    """tensor has one scale for a whole operand (each expert's weight has its own): one outlier then costs all others
    their small values. An operand is what one rank multiplies in one micro-batch."""
    scales: Literal["fp32", "power_of_two"] = "fp32"
    """power_of_two rounds each scale up to a power of two, so that scaling itself rounds nothing (section 3.3.3, there
    for some of the cached and dispatched activations)."""
    gradients: Literal["e4m3", "e5m2"] = "e4m3"
    """Format of gradients with respect to outputs; e5m2 has a larger range and one bit less of mantissa: for
    one scale a tensor."""
    accumulation: Literal["fp32", "promoted", "unpromoted"] = "fp32"
    """fp32 adds up in fp32 throughout, and is fast. The others emulate a Hopper tensor core, which keeps 14 bits:
    promoted adds its sums of 128 products in fp32 (section 3.3.2), unpromoted never does. They multiply one by one,
    hundreds of times slower: for single products and very small models."""
    dispatch: bool = False
    """Expert inputs are rounded before they are dispatched and travel as one byte a value with a power-of-two scale for
    each 128 (section 3.3.3), whatever ``scales`` says; with one rank they are rounded all the same. What comes back,
    and all gradients, travel in ``precision.compute``."""

    @model_validator(mode="after")
    def _dispatched_rows_have_tiles(self) -> "DeepseekV3Fp8Config":
        if self.dispatch and self.scaling == "tensor":
            raise ValueError("dispatch sends a scale for each tile, but scaling is tensor; set dispatch to false")
        return self


Fp8Config = Annotated[NoFp8Config | DeepseekV3Fp8Config, Field(discriminator="kind")]
