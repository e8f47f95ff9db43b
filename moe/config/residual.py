"""How sub-layers are joined to what passes them by. ``model.residual``."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from moe.config.base import Config

Streams = Annotated[int, Field(ge=2)]


class PlainResidualConfig(Config):
    """One stream: ``x + F(x)``."""

    kind: Literal["plain"] = "plain"


class HyperConfig(Config):
    """Hyper-connections without a constraint: the control for ``mhc``.

    Several streams, ``X' = B X + C F(A X)`` with A, B and C read off the streams. The idea is that of arXiv 2409.19606;
    projections and start are those of ``mhc``, so that the constraint is the only difference (the paper projects every
    stream by itself and squashes the projections with tanh).
    """

    kind: Literal["hyper"] = "hyper"
    streams: Streams = 4
    """Copies of the embedding that the residual stream starts from."""
    alpha: PositiveFloat = 0.01
    """Initial factor of the part of A, B and C that depends on the token (as in mHC's paper, unconfirmed)."""


class MhcConfig(Config):
    """Manifold-constrained hyper-connections (arXiv 2512.24880; DeepSeek-V4 report, section 2.2).

    As ``hyper``, with A in (0, 1), C in (0, 2) and B doubly stochastic: rows and columns of a product of such matrices
    still add up to 1, however deep the model.
    """

    kind: Literal["mhc"] = "mhc"
    streams: Streams = 4
    """Copies of the embedding that the residual stream starts from."""
    alpha: PositiveFloat = 0.01
    """Initial factor of the part of A, B and C that depends on the token (unconfirmed)."""
    sinkhorn_rounds: PositiveInt = 20
    """Rounds of column and row normalisation that make B doubly stochastic. Rows are exact after each. Columns of 1000
    random 4 x 4 matrices are off by up to 2e-16, 2e-4 and 5e-2 after 20 rounds where logits have a standard deviation
    of 0.3, 1 and 3 (medians 0, 4e-13 and 2e-4); around the start, which is near the identity, 20 rounds leave a third
    of what is off."""


ResidualConfig = Annotated[PlainResidualConfig | HyperConfig | MhcConfig, Field(discriminator="kind")]
