"""Gradient clipping, one technique a file.

Every technique reports ``clipped``, 1 for a step in which it clipped anything and 0 for others: its mean over a run is
the clip rate. Where tensors shrink, ``clip_factor`` is the global L2 norm after clipping over that before; where single
elements do, ``clipped_fraction`` is their share among all.
"""

from moe.config.base import Config
from moe.config.clip import (
    AdaGcClipConfig,
    GlobalClipConfig,
    GroupClipConfig,
    NoClipConfig,
    SpamClipConfig,
    StableSpamClipConfig,
    ZClipConfig,
)
from moe.stability.clip.adagc import AdaGcClip
from moe.stability.clip.global_norm import GlobalClip
from moe.stability.clip.group import GroupClip
from moe.stability.clip.spam import SpamClip
from moe.stability.clip.stable_spam import StableSpamClip
from moe.stability.clip.zclip import ZClip
from moe.stability.technique import Technique

CLIP: dict[type[Config], type[Technique]] = {
    NoClipConfig: Technique,
    GlobalClipConfig: GlobalClip,
    GroupClipConfig: GroupClip,
    ZClipConfig: ZClip,
    AdaGcClipConfig: AdaGcClip,
    SpamClipConfig: SpamClip,
    StableSpamClipConfig: StableSpamClip,
}
