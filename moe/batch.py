"""What the trainer is fed with.

Shape legend: B sequences, S tokens per sequence, L = S + 1 + MTP depth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    ``ids_BL`` holds token ids, int64. Positions ``[:, :S]`` are inputs and ``[:, 1:S+1]`` their targets; what lies
    beyond is read by multi-token prediction alone. ``real_BL`` (bool) is False where a position is padding; None
    says that there is no padding. Padding counts neither as load nor as loss.

    ``documents_BL`` (integers) numbers the document that each position belongs to: a position then attends to earlier
    ones of its own document alone (intra-document masking, arXiv 2402.13991). None lets it attend to all earlier ones.

    ``domains_BL`` (int64) is the class of the document that each position belongs to, below ``model.moe.bias_domains``:
    it says which expert bias routes a token. None says that all are of class 0.
    """

    ids_BL: torch.Tensor
    real_BL: torch.Tensor | None = None
    documents_BL: torch.Tensor | None = None
    domains_BL: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on ``device``."""
        real = None if self.real_BL is None else self.real_BL.to(device)
        documents = None if self.documents_BL is None else self.documents_BL.to(device)
        domains = None if self.domains_BL is None else self.domains_BL.to(device)
        return Batch(self.ids_BL.to(device), real, documents, domains)


# The micro-batches of this rank at an optimizer step (from 0): a pure function of the step.
BatchSource = Callable[[int], Sequence[Batch]]
