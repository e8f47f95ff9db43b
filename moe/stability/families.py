"""All families of techniques, and the techniques of one run."""

from moe.config.base import Config
from moe.config.model import ModelConfig
from moe.config.stability import StabilityConfig
from moe.parallel import Ranks
from moe.stability.anticipation import ANTICIPATION
from moe.stability.balance import BALANCE
from moe.stability.balance_loss import BALANCE_LOSS
from moe.stability.clip import CLIP
from moe.stability.qk_clip import QK_CLIP
from moe.stability.technique import Technique
from moe.stability.z_loss import LM_Z_LOSS, ROUTER_Z_LOSS

# Field of StabilityConfig -> its config classes and their implementations.
FAMILIES: dict[str, dict[type[Config], type[Technique]]] = {
    "balance": BALANCE,
    "balance_loss": BALANCE_LOSS,
    "router_z_loss": ROUTER_Z_LOSS,
    "lm_z_loss": LM_Z_LOSS,
    "clip": CLIP,
    "anticipation": ANTICIPATION,
    "qk_clip": QK_CLIP,
}


def build_techniques(config: StabilityConfig, model: ModelConfig, ranks: Ranks) -> dict[str, Technique]:
    """One technique per family, in the order in which their slots are called."""
    chosen = {field: getattr(config, field) for field in FAMILIES}
    return {field: FAMILIES[field][type(choice)](choice, model, ranks) for field, choice in chosen.items()}
