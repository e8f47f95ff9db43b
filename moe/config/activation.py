"""The gated activation of every feed-forward layer. ``model.activation``.

One choice for dense layers, shared experts and routed experts, so that no path of a token is left unbounded. (Whether
DeepSeek-V4 clamps its shared experts is unconfirmed; the implementation in Hugging Face's transformers does.)
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from moe.config.base import Config


class SwigluConfig(Config):
    """``silu(gate) * up`` (arXiv 2002.05202)."""

    kind: Literal["swiglu"] = "swiglu"


class SwigluClampConfig(Config):
    """SwiGLU whose inputs are clamped: ``up`` to [-limit, limit], ``gate`` to at most limit (DeepSeek-V4 report).

    No coordinate of the activation exceeds limit^2. What is clamped gets no gradient. Where no input ever reaches the
    limit it changes nothing at all, so its effect can only be claimed beside ``activation/expert_max``.
    """

    kind: Literal["swiglu_clamp"] = "swiglu_clamp"
    limit: PositiveFloat = 10.0


class SituGluConfig(Config):
    """``gate_bound tanh(gate / gate_bound) sigmoid(gate) * up_bound tanh(up / up_bound)``: a smooth bound.

    Attributed to Kimi K3 (arXiv 2607.24653), formula and values unconfirmed. No coordinate of the activation exceeds
    gate_bound * up_bound; unlike a clamp, every coordinate keeps a gradient.
    """

    kind: Literal["situ_glu"] = "situ_glu"
    gate_bound: PositiveFloat = 4.0
    up_bound: PositiveFloat = 25.0


ActivationConfig = Annotated[SwigluConfig | SwigluClampConfig | SituGluConfig, Field(discriminator="kind")]
