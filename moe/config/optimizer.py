"""Optimizers. ``optimizer``."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from moe.config.base import Config

Beta = Annotated[float, Field(ge=0, lt=1)]
Epsilon = Annotated[float, Field(ge=1e-20)]


class AdamwConfig(Config):
    """AdamW (arXiv 1711.05101) with the betas of DeepSeek-V3."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Epsilon = 1e-8
    """Added to the root of the second moment. DeepSeek-V4 takes 1e-20, which is the least here: a gradient
    whose square is 0 in fp32 (below 1e-22) is divided by eps alone, and its step must stay a small one."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; norm gains are never decayed."""
    decay_embeddings: bool = True
    """Whether the token embedding decays with the other matrices (as in OLMoE) or not (as in OLMo 2). The output head
    always does."""
    decay_router: bool = True
    """Whether the routers' matrices decay with the others."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which both moments are kept and saved. bf16, as in DeepSeek-V3 (arXiv 2412.19437, section 3.3.3), halves
    the memory of the optimizer; the update is computed in fp32, then the moments are rounded to nearest."""
    update_clip: Literal["none", "rms"] = "none"
    """rms divides the learning rate of a tensor by max(1, RMS of gradient over root second moment), as StableAdamW
    (arXiv 2304.13013) does; each expert is a tensor of its own."""

    @model_validator(mode="after")
    def _bf16_moments_fade(self) -> "AdamwConfig":
        largest = 1 - 2**-8
        for key in ("beta1", "beta2"):
            if self.moments == "bf16" and (beta := getattr(self, key)) > largest:
                raise ValueError(
                    f"moments=bf16 needs {key} of at most {largest:.4f} (it is {beta}): bf16 keeps 8 bits, "
                    "so a step of 1 - beta rounds to nothing and the moment never fades"
                )
        return self

    @model_validator(mode="after")
    def _something_decays(self) -> "AdamwConfig":
        for key in ("decay_embeddings", "decay_router"):
            if self.weight_decay == 0 and not getattr(self, key):
                raise ValueError(f"{key}=false has no effect, since weight_decay is 0; leave it out")
        return self


# The next optimizer makes this a union discriminated by ``kind``, as the families in moe.config.stability are.
OptimizerConfig = AdamwConfig
