"""Bounds on attention logits by their weights. ``stability.qk_clip``."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from moe.config.base import Config


class NoQkClipConfig(Config):
    """Weights are what the optimizer makes them."""

    kind: Literal["none"] = "none"


class MaxLogitQkClipConfig(Config):
    """Query and key weights of a head shrink after a step in which one of its logits was too large (QK-Clip).

    Kimi K2, arXiv 2507.20534; read in secondary sources, unconfirmed.
    """

    kind: Literal["max_logit"] = "max_logit"
    threshold: PositiveFloat = 100.0
    """Largest attention logit of a head, after the softmax scale (tau)."""


QkClipConfig = Annotated[NoQkClipConfig | MaxLogitQkClipConfig, Field(discriminator="kind")]
