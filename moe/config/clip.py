"""Clipping of gradients. ``stability.clip``."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from moe.config.base import Config


class NoClipConfig(Config):
    """Gradients are used as they are."""

    kind: Literal["none"] = "none"


class GlobalClipConfig(Config):
    """All gradients scaled together so that their global L2 norm is at most ``max_norm``."""

    kind: Literal["global"] = "global"
    max_norm: PositiveFloat = 1.0


ClipConfig = Annotated[NoClipConfig | GlobalClipConfig, Field(discriminator="kind")]
