"""Cross-entropy as sums over real tokens, so that any division of a batch adds up to the same loss.

Shape legend: B sequences, S positions, L = S + 1 + MTP depth, V vocabulary.
"""

import torch
import torch.nn.functional as F

from moe.batch import Batch


def counted_targets(batch: Batch, length: int, shift: int) -> torch.Tensor:
    """Targets [B, S] ``shift`` tokens ahead, -100 where input, target or a token between them is padding."""
    targets_BS = batch.ids_BL[:, shift : shift + length]
    if batch.real_BL is None:
        return targets_BS
    counted_BS = batch.real_BL[:, :length]
    for ahead in range(1, shift + 1):
        counted_BS = counted_BS & batch.real_BL[:, ahead : ahead + length]
    return targets_BS.masked_fill(~counted_BS, -100)


def cross_entropy_sum(logits_BSV: torch.Tensor, targets_BS: torch.Tensor) -> torch.Tensor:
    """Sum of -log softmax at the targets, in nats, fp32; targets of -100 count nothing."""
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), ignore_index=-100, reduction="sum")
