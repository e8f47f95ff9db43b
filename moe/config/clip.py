"""Clipping of gradients. ``stability.clip``."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moe.config.base import Config

Decay = Annotated[float, Field(ge=0, lt=1)]
AboveOne = Annotated[float, Field(gt=1)]
ResetPeriod = Annotated[int, Field(ge=2)]


class NoClipConfig(Config):
    """Gradients are used as they are."""

    kind: Literal["none"] = "none"


class GlobalClipConfig(Config):
    """All gradients scaled together so that their global L2 norm is at most ``max_norm``."""

    kind: Literal["global"] = "global"
    max_norm: PositiveFloat = 1.0


class GroupClipConfig(Config):
    """Dense, router and expert gradients clipped apart: a spike in one group does not shrink the others' updates.

    A combination of this project; each group is clipped as ``global`` clips the whole. For one and the same gradient,
    three limits of 1 allow a global norm of up to 1.73.
    """

    kind: Literal["group"] = "group"
    max_norm: PositiveFloat = 1.0
    """Largest L2 norm of every group that has no limit of its own."""
    dense_max_norm: PositiveFloat | None = None
    """Largest L2 norm of what is neither router nor routed expert; null takes max_norm."""
    router_max_norm: PositiveFloat | None = None
    """Largest L2 norm of all routers together; null takes max_norm."""
    experts_max_norm: PositiveFloat | None = None
    """Largest L2 norm of all routed experts together; null takes max_norm."""

    def limits(self, max_norm: float) -> dict[Literal["dense", "router", "experts"], float]:
        """Largest norm of each group, where those without a limit of their own get ``max_norm``."""
        return {
            "dense": self.dense_max_norm or max_norm,
            "router": self.router_max_norm or max_norm,
            "experts": self.experts_max_norm or max_norm,
        }

    @model_validator(mode="after")
    def _max_norm_is_used(self) -> "GroupClipConfig":
        # By value, since a written config that is read back has every key.
        default = GroupClipConfig.model_fields["max_norm"].default
        if None not in (self.dense_max_norm, self.router_max_norm, self.experts_max_norm) and self.max_norm != default:
            raise ValueError(
                "max_norm has no effect, since dense_max_norm, router_max_norm and experts_max_norm are all set; "
                "leave it out"
            )
        return self


class ZClipConfig(Config):
    """Global norm clipped where it is an outlier of its own recent past (ZClip, arXiv 2504.02507).

    Defaults are those of the authors' code.
    """

    kind: Literal["zclip"] = "zclip"
    decay: Decay = 0.97
    """Weight of the past in the moving mean and variance of the norm, per step (alpha)."""
    z_threshold: PositiveFloat = 2.5
    """Standard deviations above the mean from which a norm is clipped."""
    warmup_steps: Annotated[int, Field(ge=2)] = 25
    """Updates that only collect norms; mean and variance begin as those of these."""
    max_norm: PositiveFloat | None = 1.0
    """Limit on the global norm on top, from the first step on; null for none."""


class AdaGcClipConfig(Config):
    """Each tensor and each expert clipped to its own moving average norm (AdaGC, arXiv 2502.11034).

    Defaults are those of the authors' PyTorch code for GPT-2; the paper's own values are unconfirmed.
    """

    kind: Literal["adagc"] = "adagc"
    relative_limit: AboveOne = 1.04
    """Largest norm of a tensor as a multiple of its average (lambda_rel)."""
    decay: Decay = 0.99
    """Weight of the past in a tensor's average norm, per step (beta)."""
    warmup_steps: NonNegativeInt = 100
    """Updates with a global clip, which look for each tensor's smallest norm: where its average begins."""
    warmup_max_norm: PositiveFloat = 1.0
    """Largest global norm during the warm-up (lambda_abs)."""


class SpamClipConfig(Config):
    """Elements clipped by Adam's second moment, moments reset at intervals (SPAM, arXiv 2501.06842).

    Defaults are those of a public copy of the authors' training script; the paper's own values are unconfirmed. They
    are for beta2 = 0.999: with 0.95 the second moment forgets in 20 steps instead of 1000, and an element that stays
    still for 170 counts as spiking when it moves again.
    """

    kind: Literal["spam"] = "spam"
    threshold: AboveOne = 5000.0
    """Largest square of an element as a multiple of its second moment (theta)."""
    reset_every_steps: ResetPeriod = 500
    """Updates from one reset of the moments to the next (Delta T)."""
    rewarmup_steps: NonNegativeInt = 150
    """Updates after a reset over which the learning rate comes back, along half a cosine."""
    settle_steps: PositiveInt = 20
    """Updates after the start and after a reset before elements are clipped: the second moment must fill first."""

    @model_validator(mode="after")
    def _phases_fit(self) -> "SpamClipConfig":
        for key in ("rewarmup_steps", "settle_steps"):
            if (steps := getattr(self, key)) >= self.reset_every_steps:
                raise ValueError(f"{key} ({steps}) must be less than reset_every_steps ({self.reset_every_steps})")
        return self


class StableSpamClipConfig(Config):
    """Elements clipped by the tensor's usual maximum, tensors normalised (Stable-SPAM, arXiv 2502.17055).

    Defaults are those of a public copy of the authors' code; the paper's own values are unconfirmed.
    """

    kind: Literal["stable_spam"] = "stable_spam"
    max_decay: Decay = 0.999
    """Weight of the past in a tensor's average largest element, per step (gamma3)."""
    norm_decay: Decay = 0.7
    """Weight of the past in a tensor's average norm, per step (gamma1)."""
    norm_square_decay: Decay = 0.9
    """Weight of the past in a tensor's average squared norm, per step (gamma2)."""
    reset_every_steps: ResetPeriod = 1000
    """Updates from one reset of the moments to the next (Delta T)."""


ClipConfig = Annotated[
    NoClipConfig
    | GlobalClipConfig
    | GroupClipConfig
    | ZClipConfig
    | AdaGcClipConfig
    | SpamClipConfig
    | StableSpamClipConfig,
    Field(discriminator="kind"),
]
