"""Which experts a token takes, given its scores. ``model.moe.selection``."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from moe.config.base import Config


class TopKSelectionConfig(Config):
    """The model.moe.top_k best of every token."""

    kind: Literal["top_k"] = "top_k"


class ThresholdSelectionConfig(Config):
    """Every expert whose affinity is above a threshold of its own, so that tokens differ in how many they take (Su,
    "MoE tour, part 7", kexue.fm). model.moe.top_k is their mean number. The thresholds are the expert biases, negated;
    stability.balance.kind=threshold moves them."""

    kind: Literal["threshold"] = "threshold"
    max_experts: PositiveInt | None = None
    """Most experts of one token: of more above their thresholds, those farthest above are taken. Null takes 2 top_k, or
    all experts if they are fewer. The mean number falls below top_k by what is cut off."""


SelectionConfig = Annotated[TopKSelectionConfig | ThresholdSelectionConfig, Field(discriminator="kind")]
