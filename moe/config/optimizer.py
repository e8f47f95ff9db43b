"""Optimizers. ``optimizer``."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from moe.config.base import Config

Beta = Annotated[float, Field(ge=0, lt=1)]
Epsilon = Annotated[float, Field(ge=1e-20)]


class AdamwOptions(Config):
    """What every optimizer has: a learning rate, and AdamW for all parameters or for some."""

    outlive_kind: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
    """Keys that mean the same in every kind: a layer of config that changes the kind leaves them as they are."""

    kind: str
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
    """Dtype in which moments are kept and saved. bf16, as in DeepSeek-V3 (arXiv 2412.19437, section 3.3.3), halves
    the memory of the optimizer; the update is computed in fp32, then the moments are rounded to nearest."""
    update_clip: Literal["none", "rms"] = "none"
    """rms divides AdamW's learning rate of a tensor by max(1, RMS of gradient over root second moment), as StableAdamW
    (arXiv 2304.13013) does; each expert is a tensor of its own."""

    _decays: ClassVar[tuple[str, ...]] = ("beta1", "beta2")
    """Keys of what a moment is multiplied by in every step."""

    @model_validator(mode="after")
    def _bf16_moments_fade(self) -> "AdamwOptions":
        largest = 1 - 2**-8
        for key in self._decays:
            if self.moments == "bf16" and (beta := getattr(self, key)) > largest:
                raise ValueError(
                    f"moments=bf16 needs {key} of at most {largest:.4f} (it is {beta}): bf16 keeps 8 bits, "
                    "so a step of 1 - beta rounds to nothing and the moment never fades"
                )
        return self

    @model_validator(mode="after")
    def _something_decays(self) -> "AdamwOptions":
        for key in ("decay_embeddings", "decay_router"):
            if self.weight_decay == 0 and not getattr(self, key):
                raise ValueError(f"{key}=false has no effect, since weight_decay is 0; leave it out")
        return self


class AdamwConfig(AdamwOptions):
    """AdamW (arXiv 1711.05101) with the betas of DeepSeek-V3."""

    kind: Literal["adamw"] = "adamw"


class MuonConfig(AdamwOptions):
    """Muon for the matrices of attention, feed-forward layers and experts, AdamW for everything else (DeepSeek-V4).

    The update of a matrix has the size of an AdamW update (``update_rms``), so both share learning rate and decay.
    beta1, beta2, eps, decay_embeddings, decay_router and update_clip are those of the AdamW part.
    """

    kind: Literal["muon"] = "muon"
    momentum: Beta = 0.95
    """What the sum of gradients is multiplied by in every step (mu)."""
    update_rms: PositiveFloat = 0.18
    """Root mean square of a whole matrix's update at a learning rate of 1 (gamma)."""
    newton_schulz_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the products that orthogonalise an update. bf16 is faster on a GPU; singular values then end within 3 %
    of 1 rather than 0.1 %."""

    _decays: ClassVar[tuple[str, ...]] = ("beta1", "beta2", "momentum")


OptimizerConfig = Annotated[AdamwConfig | MuonConfig, Field(discriminator="kind")]
