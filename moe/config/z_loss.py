"""Penalties on the size of logits. ``stability.router_z_loss`` and ``stability.lm_z_loss``."""

from pydantic import NonNegativeFloat

from moe.config.base import Config


class RouterZLossConfig(Config):
    """Squared log-partition of the router's logits (ST-MoE, arXiv 2202.08906, eq. 5)."""

    coefficient: NonNegativeFloat = 0.0
    """Weight of the loss; 0 is off. 1e-3 is the usual one (said of ST-MoE and OLMoE; unconfirmed)."""


class LmZLossConfig(Config):
    """Squared log-partition of the next token's logits (PaLM, arXiv 2204.02311, section 5)."""

    coefficient: NonNegativeFloat = 0.0
    """Weight of the loss; 0 is off. 1e-4 is the usual one (said of PaLM; unconfirmed)."""
