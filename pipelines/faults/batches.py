"""The faults of ``faults`` that are bad text, laid over what the trainer is fed with.

Shape legend: B sequences, S tokens per sequence, L = S + 1 + MTP depth.
"""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import torch

from moe.batch import Batch, BatchSource
from pipelines.config import RunConfig
from pipelines.data import TrainBatches
from pipelines.fault_config import CorruptedBatchConfig, CorruptedBatchesConfig
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
        return [_with_ids(batch, _corrupt(batch.ids_BL, self._fault, *self._key, step)) for batch in batches]


class CorruptedSamples:
    """A ``moe.batch.BatchSource`` in which the samples of one step are bad text, at whatever step they are read.

    Which samples is settled when it is made: those of the step while none is left out.
    """

    def __init__(self, batches: BatchSource, fault: CorruptedBatchConfig, order: TrainBatches, *key: int) -> None:
        """``order`` knows which sample each sequence of ``batches`` is of, and is to leave out none yet."""
        self._batches = batches
        self._fault = fault
        self._order = order
        self._key = key
        self.samples = frozenset(order.sample_ids(fault.step - 1).tolist())

    def __call__(self, step: int) -> Sequence[Batch]:
        """This rank's micro-batches at optimizer step ``step`` (from 0)."""
        batches = self._batches(step)
        is_bad_B = torch.from_numpy(np.isin(self._order.samples_of_rows(step), list(self.samples)))
        if not is_bad_B.any():
            return batches
        rows = is_bad_B.split([len(batch.ids_BL) for batch in batches])
        return [self._corrupt_rows(batch, bad_B) for batch, bad_B in zip(batches, rows, strict=True)]

    def _corrupt_rows(self, batch: Batch, bad_B: torch.Tensor) -> Batch:
        # By the key alone: text does not change from one reading to the next.
        corrupt_BL = _corrupt(batch.ids_BL, self._fault, *self._key)
        return _with_ids(batch, torch.where(bad_B.unsqueeze(1), corrupt_BL, batch.ids_BL))


def _with_ids(batch: Batch, ids_BL: torch.Tensor) -> Batch:
    if batch.real_BL is not None:
        # Tokens would move into the padding and out of it.
        raise ValueError("a batch with padding cannot be corrupted")
    return replace(batch, ids_BL=ids_BL)


def _corrupt(ids_BL: torch.Tensor, fault: CorruptedBatchesConfig | CorruptedBatchConfig, *key: int) -> torch.Tensor:
    length = ids_BL.shape[1]
    if fault.content == "repeated_ngram":
        return ids_BL[:, torch.arange(length) % fault.ngram_tokens]
    # One order for all rows: a row's own would need its place in the global batch, which a rank does not know.
    order = Permutation(length, "shuffled_tokens", *key)
    return ids_BL[:, torch.from_numpy(order(np.arange(length)))]


def with_faults(batches: BatchSource, config: RunConfig) -> BatchSource:
    """``batches`` of training with all bad text of ``config`` on top, in its order; itself if there is none.

    For the samples of one step ``batches`` must be `TrainBatches` that leave out none yet.
    """
    faulty = batches
    for number, fault in enumerate(config.faults):
        if isinstance(fault, CorruptedBatchesConfig):
            faulty = CorruptedBatches(faulty, fault, config.seed, number)
        elif isinstance(fault, CorruptedBatchConfig):
            if not isinstance(batches, TrainBatches):
                raise TypeError(f"the samples of a step are unknown in {type(batches).__name__}")
            faulty = CorruptedSamples(faulty, fault, batches, config.seed, number)
    return faulty


def corrupted_steps(config: RunConfig) -> frozenset[int]:
    """The optimizer steps of the whole schedule, counted from 1, whose batch is corrupted by any of the faults."""
    steps: set[int] = set()
    for number, fault in enumerate(config.faults):
        if isinstance(fault, CorruptedBatchesConfig):
            possible = range(fault.from_step, config.steps + 1)
            steps.update(step for step in possible if _is_hit(fault, (config.seed, number), step))
        elif isinstance(fault, CorruptedBatchConfig):
            steps.add(fault.step)
    return frozenset(steps)


def _is_hit(fault: CorruptedBatchesConfig, key: Sequence[int], step: int) -> bool:
    """Whether the fault hits optimizer step ``step``, counted from 1."""
    if step < fault.from_step:
        return False
    text = "\0".join(str(part) for part in (fault.kind, *key, step))
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fault.share * 2**64
