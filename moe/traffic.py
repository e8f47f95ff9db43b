"""Where a token's experts live, and what it costs to send it there: a model of bytes on the wire.

The experts of a layer are spread in equal contiguous parts by id: over expert-parallel ranks, or over nodes, whether
those exist or not. A token travels once to each part that holds any of its experts, and one combined vector comes back
(`moe.layers.dispatch`); in training the gradients of both go the same ways. Row counts, ids and gates are left out.

Shape legend: T tokens, K experts per token, P parts.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

Wire = Literal["fp32", "bf16", "fp8"]
"""fp8 is that of ``precision.fp8.dispatch`` beside bf16: vectors go out in FP8, all else travels in bf16. (DeepSeek-V3,
arXiv 2412.19437, section 3.3.3, also sends out the gradients of the experts' sums in FP8.)"""

_FP8_TILE = 128
"""Values that share a scale, which is a byte: a power of two."""


@dataclass(frozen=True)
class Spread:
    """The experts of a layer over ``parts`` parts.

    Raises:
        ValueError: the parts are not equal.
    """

    num_experts: int
    parts: int

    def __post_init__(self) -> None:
        if self.num_experts % self.parts:
            raise ValueError(f"{self.num_experts} experts do not divide into {self.parts} equal parts")

    def visits(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Which parts hold any of a token's experts, bool [T, P]; ids from ``num_experts`` on live nowhere."""
        part_TK = (ids_TK // (self.num_experts // self.parts)).clamp(max=self.parts)
        visits = torch.zeros(len(ids_TK), self.parts + 1, dtype=torch.bool, device=ids_TK.device)
        return visits.scatter_(1, part_TK, True)[:, : self.parts]

    def parts_per_token(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """How many parts hold any of a token's experts, int64 [T]."""
        return self.visits(ids_TK).sum(dim=1)

    def remote_visits(self, ids_TK: torch.Tensor, here: int) -> int:
        """(token, part) pairs that tokens which start from part ``here`` travel for."""
        visits_TP = self.visits(ids_TK)
        return int(visits_TP.sum() - visits_TP[:, here].sum())

    def expected_parts(self, top_k: int) -> float:
        """Mean of ``parts_per_token`` where any ``top_k`` experts are as likely as any others.

        A part is missed where all choices fall outside of it: ``C(E - E/P, K) / C(E, K)``.
        """
        outside = self.num_experts - self.num_experts // self.parts
        return self.parts * (1 - math.comb(outside, top_k) / math.comb(self.num_experts, top_k))


def dispatch_bytes(width: int, wire: Wire) -> int:
    """Bytes of one vector of ``width`` values on its way out."""
    if wire == "fp8":
        return width + math.ceil(width / _FP8_TILE)
    return combine_bytes(width, wire)


def combine_bytes(width: int, wire: Wire) -> int:
    """Bytes of one vector of ``width`` values on its way back, and of a gradient either way."""
    return width * (4 if wire == "fp32" else 2)


def payload_bytes(remote_visits: int, width: int, wire: Wire, *, training: bool) -> int:
    """Bytes that so many (token, remote part) pairs of a layer cost, all ranks' sends together.

    Dispatch and combine; in training also the gradient of a combine, which goes out, and that of a dispatch.
    """
    passes = dispatch_bytes(width, wire) + (3 if training else 1) * combine_bytes(width, wire)
    return remote_visits * passes
