"""The faults of ``faults``, laid over what the trainer is fed with.

Shape legend: B sequences, S tokens per sequence, L = S + 1 + MTP depth.
"""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import torch

from moe.batch import Batch, BatchSource
from pipelines.config import RunConfig
from pipelines.fault_config import CorruptedBatchesConfig
from pipelines.order import Permutation


class CorruptedBatches:
    """A ``moe.batch.BatchSource`` whose batches are spoiled at some steps, and those of ``batches`` at all others.

    Which steps, and how, follows from the key and the step alone: nothing of it is saved, and every number of ranks
    reads the same global batch.
    """

    def __init__(self, batches: BatchSource, fault: CorruptedBatchesConfig, *key: int) -> None:
        """``key``: what tells this fault's choices from those of another run, or of another fault of the same run."""
        self._batches = batches
        self._fault = fault
        self._key = key

    def __call__(self, step: int) -> Sequence[Batch]:
        """This rank's micro-batches at optimizer step ``step`` (from 0).

        Documents stay where they were: a spoiled batch differs from the whole one in its tokens alone, so that with
        intra-document masking both attend over the same positions.
        """
        batches = self._batches(step)
        if not _is_hit(self._fault, self._key, step + 1):
            return batches
        if any(batch.real_BL is not None for batch in batches):
            # Tokens would move into the padding and out of it.
            raise ValueError("a batch with padding cannot be corrupted")
        return [replace(batch, ids_BL=self._corrupt(batch.ids_BL, step)) for batch in batches]

    def _corrupt(self, ids_BL: torch.Tensor, step: int) -> torch.Tensor:
        length = ids_BL.shape[1]
        if self._fault.content == "repeated_ngram":
            return ids_BL[:, torch.arange(length) % self._fault.ngram_tokens]
        # One order for all rows: a row's own would need its place in the global batch, which a rank does not know.
        order = Permutation(length, "shuffled_tokens", *self._key, step)
        return ids_BL[:, torch.from_numpy(order(np.arange(length)))]


def with_faults(batches: BatchSource, config: RunConfig) -> BatchSource:
    """``batches`` of training with every fault of ``config`` on top, in their order; itself if there is none."""
    for number, fault in enumerate(config.faults):
        batches = CorruptedBatches(batches, fault, config.seed, number)
    return batches


def corrupted_steps(config: RunConfig) -> frozenset[int]:
    """The optimizer steps of the whole schedule, counted from 1, whose batch is corrupted by any of the faults."""
    return frozenset(
        step
        for number, fault in enumerate(config.faults)
        for step in range(fault.from_step, config.steps + 1)
        if _is_hit(fault, (config.seed, number), step)
    )


def _is_hit(fault: CorruptedBatchesConfig, key: Sequence[int], step: int) -> bool:
    """Whether the fault hits optimizer step ``step``, counted from 1."""
    if step < fault.from_step:
        return False
    text = "\0".join(str(part) for part in (fault.kind, *key, step))
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fault.share * 2**64
