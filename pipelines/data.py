"""Which sample is read at which step, on which rank, and what is read for validation.

Shape legend: B sequences, S tokens per sequence, L = S + 1 + MTP depth.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from moe.batch import Batch
from moe.config.trainer import BatchConfig
from moe.schedule import Timeline
from pipelines.config import DataConfig, RunConfig
from pipelines.domains import DocumentClasses, document_classes
from pipelines.errors import UserError
from pipelines.order import SampleOrder, Skip
from pipelines.shards import DocumentSpan, Shards, TokenStream

# Room kept behind the last sample whether it is read or not, so that switching multi-token prediction on changes
# neither the number of samples nor their order.
_MAX_LOOKAHEAD = 1


class TokenDataset:
    """Samples of one split: sample i is tokens [i S, i S + S + 1 + lookahead) of the stream.

    Neighbours share their border token, so that each token but the stream's first is the target of one sample; what is
    left at the end, less than a sample, is not read.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, lookahead: int = 0) -> None:
        """``lookahead`` is the MTP depth. UserError if the stream is too short for one sample."""
        if not 0 <= lookahead <= _MAX_LOOKAHEAD:
            raise ValueError(f"lookahead {lookahead} is not in 0 to {_MAX_LOOKAHEAD}")
        self.stream = stream
        self.sequence_length = sequence_length
        self.length = sequence_length + 1 + lookahead
        self._lookahead = lookahead
        self._samples = max(0, len(stream) - 1 - _MAX_LOOKAHEAD) // sequence_length
        if self._samples == 0:
            raise UserError(
                f"data.sequence_length ({sequence_length}) is too long: the {stream.split} part of data.corpus has "
                f"{len(stream)} tokens; shorten it or give more text"
            )

    def __len__(self) -> int:
        """Samples."""
        return self._samples

    def read(self, samples: Sequence[int] | NDArray[np.int64], parts: int = 1) -> torch.Tensor:
        """Token ids of ``samples``, int64 [B, L].

        With ``parts`` above 1 each sample is divided into so many shorter sequences that follow each other: then B is
        ``parts`` times the samples, and S a part of ``sequence_length``.
        """
        return self._rows(self.stream.read, samples, parts)

    def read_classes(
        self, classes: DocumentClasses | None, samples: Sequence[int] | NDArray[np.int64], parts: int = 1
    ) -> torch.Tensor | None:
        """The class of the document behind each token of ``read``, int64 [B, L]; None where there are no classes."""
        return None if classes is None else self._rows(classes.read, samples, parts)

    def _rows(
        self,
        read: Callable[[int, int], NDArray[np.integer[Any]]],
        samples: Sequence[int] | NDArray[np.int64],
        parts: int,
    ) -> torch.Tensor:
        step = self.sequence_length // parts
        length = step + 1 + self._lookahead
        rows_BL = np.empty((len(samples) * parts, length), np.int64)
        for row in range(len(rows_BL)):
            start = self._start(int(samples[row // parts])) + (row % parts) * step
            rows_BL[row] = read(start, start + length)
        return torch.from_numpy(rows_BL)

    def documents(self, sample: int) -> list[DocumentSpan]:
        """The documents in a sample, in order: names, and which of their tokens (inputs and targets) it holds."""
        start = self._start(sample)
        return self.stream.documents(start, start + self.sequence_length + 1)

    def target_bytes(self, sample: int) -> int:
        """Bytes of text behind the tokens that a sample predicts; known for validation only."""
        start = self._start(sample)
        return self.stream.text_bytes(start + 1, start + self.sequence_length + 1)

    def _start(self, sample: int) -> int:
        if not 0 <= sample < self._samples:
            raise IndexError(f"sample {sample} of {self._samples}")
        return sample * self.sequence_length


def refuse_short_text(config: RunConfig, shards: Shards) -> None:
    """Find out before anything is started whether both splits hold a sample. UserError if one does not."""
    for stream in (shards.train, shards.validation):
        TokenDataset(stream, config.data.sequence_length, config.model.mtp.depth)


class TrainBatches:
    """The micro-batches of one rank at any step, as a ``moe.batch.BatchSource``.

    A global batch is decided first, from seed, data config, step and skipped samples; rank r of w reads the r-th of w
    equal contiguous parts of it. So the batch is the same whatever the number of ranks, and there is no cursor to save.
    """

    def __init__(self, dataset: TokenDataset, config: RunConfig, rank: int, world: int) -> None:
        self._dataset = dataset
        self._data = config.data
        self._seed = config.seed
        self._classes = document_classes(dataset.stream, config.data.domains)
        self._skipped: list[Skip] = []
        self._order = SampleOrder(len(dataset), config.seed, dataset.stream.split)
        self._timeline = Timeline(config)
        self._rank, self._world = rank, world
        # Found out here rather than at the first step.
        _share(config.data.global_batch_size, rank, world)
        _micro_batch_size(config.data.global_batch_size, config.data, world)

    def skip(self, samples: Sequence[int], from_step: int) -> None:
        """Read others in place of ``samples`` from the batch of ``from_step`` (from 0) on. Every rank must call it.

        The order of the calls counts: they were found bad one after the other.

        Raises:
            ValueError: no sample would be left.
        """
        position = self._first_position(from_step)
        self._skipped += [Skip(sample, position) for sample in samples]
        self._order = SampleOrder(len(self._dataset), self._seed, self._dataset.stream.split, self._skipped)

    def _first_position(self, step: int) -> int:
        return self._timeline.tokens_before(step) // self._data.sequence_length

    def sample_ids(self, step: int) -> NDArray[np.int64]:
        """Samples of the global batch, those of rank 0 first: int64, as many as its sequences make if joined to the
        length of ``data.sequence_length``."""
        return self._order(np.arange(self._first_position(step), self._first_position(step + 1)))

    def samples_of_rows(self, step: int) -> NDArray[np.int64]:
        """The sample behind each sequence of this rank's share of the batch, in order: int64 [B]."""
        moment = self._timeline.at(step)
        first, end = _share(moment.global_batch_size, self._rank, self._world)
        return self.sample_ids(step).repeat(self._data.sequence_length // moment.sequence_length)[first:end]

    def documents(self, step: int) -> dict[int, list[DocumentSpan]]:
        """The documents behind every sample of the global batch, by sample id."""
        return {sample: self._dataset.documents(sample) for sample in self.sample_ids(step).tolist()}

    def __call__(self, step: int) -> list[Batch]:
        """This rank's micro-batches, ids [micro_batch_size, L]."""
        moment = self._timeline.at(step)
        parts = self._data.sequence_length // moment.sequence_length
        first, end = _share(moment.global_batch_size, self._rank, self._world)
        # Whole samples around the share, of which the first and the last may belong to other ranks in part.
        around = self.sample_ids(step)[first // parts : -(-end // parts)]
        share = slice(first % parts, first % parts + end - first)
        ids_BL = self._dataset.read(around, parts)[share]
        domains_BL = self._dataset.read_classes(self._classes, around, parts)
        micro = _micro_batch_size(moment.global_batch_size, self._data, self._world)
        ids = ids_BL.split(micro)
        domains = [None] * len(ids) if domains_BL is None else domains_BL[share].split(micro)
        return [_batch(i, None, d, self._data, self._dataset) for i, d in zip(ids, domains, strict=True)]


class ValidationBatches:
    """Held-out windows, spread evenly over the whole stream and divided among the ranks.

    Spread, because a stream's start is a handful of documents, whatever it is a stream of. Iterating gives this rank's
    batches. Every rank gets the same number of batches of the same shape, because expert parallel ranks advance
    together; rows beyond the last window are padding. The windows are the same for every number of ranks.
    """

    def __init__(self, dataset: TokenDataset, config: RunConfig, rank: int, world: int) -> None:
        self._dataset = dataset
        self._data = config.data
        self._classes = document_classes(dataset.stream, config.data.domains)
        self._rows = _micro_batch_size(config.data.global_batch_size, config.data, world)
        self._rank, self._world = rank, world
        most = config.validation.max_tokens // dataset.sequence_length
        self.windows = spread(len(dataset), most)
        """Samples that are read, in order, all ranks' together."""
        self.num_targets = len(self.windows) * dataset.sequence_length
        """Tokens predicted over all ranks, document tokens included."""
        self.text_bytes = sum(dataset.target_bytes(window) for window in self.windows)
        """Bytes of text behind those: ``val/nats_per_byte`` is the summed loss over all ranks divided by this."""

    def __len__(self) -> int:
        """Batches of each rank."""
        return -(-len(self.windows) // (self._rows * self._world))

    @property
    def first_targets(self) -> list[int]:
        """Of each of this rank's batches, which of ``num_targets`` its first is."""
        return [window * self._dataset.sequence_length for window in self._first_windows]

    @property
    def _first_windows(self) -> list[int]:
        return [(number * self._world + self._rank) * self._rows for number in range(len(self))]

    def __iter__(self) -> Iterator[Batch]:
        for first in self._first_windows:
            windows = self.windows[first : first + self._rows]
            ids_BL, domains_BL = self._dataset.read(windows), self._dataset.read_classes(self._classes, windows)
            if len(ids_BL) == self._rows:
                yield _batch(ids_BL, None, domains_BL, self._data, self._dataset)
                continue
            padded_BL = torch.full((self._rows, self._dataset.length), self._dataset.stream.document_id)
            padded_BL[: len(ids_BL)] = ids_BL
            real_BL = torch.zeros(padded_BL.shape, dtype=torch.bool)
            real_BL[: len(ids_BL)] = True
            if domains_BL is not None:
                domains_BL = F.pad(domains_BL, (0, 0, 0, self._rows - len(domains_BL)))
            yield _batch(padded_BL, real_BL, domains_BL, self._data, self._dataset)


def documents_in(ids_BL: torch.Tensor, document_id: int) -> torch.Tensor:
    """Which document each token belongs to, counted from 0 in each row, int64 [B, L].

    The token that ends a document is its last; no text contains it.
    """
    ends_BL = (ids_BL == document_id).long()
    return ends_BL.cumsum(dim=1) - ends_BL


def _batch(
    ids_BL: torch.Tensor,
    real_BL: torch.Tensor | None,
    domains_BL: torch.Tensor | None,
    data: DataConfig,
    dataset: TokenDataset,
) -> Batch:
    documents_BL = documents_in(ids_BL, dataset.stream.document_id) if data.intra_document_masking else None
    return Batch(ids_BL, real_BL, documents_BL, domains_BL)


def spread(available: int, most: int) -> list[int]:
    """At most ``most`` different numbers below ``available``, evenly spaced."""
    taken = min(available, most)
    return [number * available // taken for number in range(taken)]


def _share(batch_size: int, rank: int, world: int) -> tuple[int, int]:
    if batch_size % world:
        raise ValueError(f"a batch of {batch_size} sequences does not divide into {world} equal parts")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}")
    share = batch_size // world
    return rank * share, (rank + 1) * share


def _micro_batch_size(batch_size: int, data: BatchConfig, world: int) -> int:
    share = batch_size // world
    micro = data.micro_batch_size or share
    if share % micro:
        raise ValueError(f"micro-batches of {micro} sequences do not divide a rank's {share}")
    return micro
