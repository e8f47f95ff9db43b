"""Optimizers. ``optimizer``."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from moe.config.base import Config

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamwConfig(Config):
    """AdamW (arXiv 1711.05101) with the betas of DeepSeek-V3."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; norm gains are never decayed."""


# The next optimizer makes this a union discriminated by ``kind``, as the families in moe.config.stability are.
OptimizerConfig = AdamwConfig
