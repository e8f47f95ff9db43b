"""What a task makes of a piece of the corpus: its documents as token ids, both splits apart."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus import Reading
from pipelines.documents import Document, read_documents
from pipelines.errors import InputError
from pipelines.pieces import Piece, WholeFiles
from pipelines.shards import Dtype
from pipelines.tokenizer import Tokenizer, decode_text, load_tokenizer

Tokens = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class EncodingJob:
    """The same for every piece."""

    reading: Reading
    tokenizer: str
    document_token: str | None
    tokenizer_fingerprint: str
    """Tells a file from another one that stood at the same place earlier."""
    dtype: Dtype


@dataclass(slots=True)
class EncodedSplit:
    """Documents of one split, in order. Each ends with the document token."""

    members: list[int]
    """Which of the piece's documents these are, from 0."""
    lengths: NDArray[np.int64]
    """Tokens of each document, its document token included."""
    tokens: Tokens
    """All of them, joined."""
    text_bytes: NDArray[np.int64]
    """Bytes of text of each document."""
    bytes_per_token: NDArray[np.uint32] | None
    """Bytes of text behind every token, where it is measured. What no token stands for counts with the document
    token."""


@dataclass(slots=True)
class EncodedPiece:
    """A piece's documents."""

    digests: list[bytes]
    """SHA-256 of every document's content."""
    places: list[int]
    """Which unit of the piece each document was, from 0."""
    units: int
    """Files, lines, rows or sections in the piece."""
    binary_files: int
    train: EncodedSplit
    validation: EncodedSplit


def encode_piece(job: EncodingJob, piece: Piece) -> EncodedPiece | InputError:
    """Read and encode a piece. A mistake in the input is returned, for its place in the file is the driver's to say."""
    try:
        found = read_documents(piece, job.reading)
    except InputError as error:
        return error
    tokenizer = _tokenizer(job.tokenizer, job.document_token, job.tokenizer_fingerprint)
    train = [(member, item) for member, item in enumerate(found.documents) if not item.held_out]
    held_out = [(member, item) for member, item in enumerate(found.documents) if item.held_out]
    encoded = tokenizer.encode_many([item.content for _, item in train])
    return EncodedPiece(
        digests=[item.digest for item in found.documents],
        places=found.places,
        units=found.units,
        binary_files=found.binary_files,
        train=_join(train, encoded, tokenizer.document_id, job.dtype),
        validation=_measure(held_out, tokenizer, job.dtype),
    )


@dataclass(slots=True)
class TrainingTexts:
    """A piece's documents of the training split, for a tokenizer to learn from."""

    documents: list[tuple[bytes, str]]
    """SHA-256 of the content, and the text."""
    units: int


def training_texts(reading: Reading, piece: Piece) -> TrainingTexts | InputError:
    """Read a piece without the documents that are held out."""
    try:
        found = read_documents(piece, reading)
    except InputError as error:
        return error
    texts = [(item.digest, decode_text(item.content)) for item in found.documents if not item.held_out]
    return TrainingTexts(texts, found.units)


Done = TypeVar("Done", EncodedPiece, TrainingTexts)


def placed(pieces: Iterator[tuple[Piece, Done | InputError]]) -> Iterator[tuple[Piece, int, Done]]:
    """Each piece with the number of lines, rows or sections before it in its file. Raises what a piece found wrong."""
    path, units = "", 0
    for piece, done in pieces:
        here = "" if isinstance(piece, WholeFiles) else piece.file.path
        if here != path:
            path, units = here, 0
        if isinstance(done, InputError):
            raise done.moved(units)
        yield piece, units, done
        units += done.units


@lru_cache(maxsize=1)
def _tokenizer(tokenizer: str, document_token: str | None, _fingerprint: str) -> Tokenizer:
    # Kept from piece to piece: reading a large vocabulary takes as long as encoding a piece.
    return load_tokenizer(tokenizer, document_token)


def _join(items: list[tuple[int, Document]], encoded: list[Tokens], document_id: int, dtype: Dtype) -> EncodedSplit:
    lengths = np.array([len(ids) + 1 for ids in encoded], np.int64)
    tokens = np.empty(int(lengths.sum()), np.dtype(dtype).newbyteorder("<"))
    at = 0
    for ids in encoded:
        tokens[at : at + len(ids)] = ids
        at += len(ids) + 1
        tokens[at - 1] = document_id
    text_bytes = np.array([len(item.content) for _, item in items], np.int64)
    return EncodedSplit([member for member, _ in items], lengths, tokens, text_bytes, bytes_per_token=None)


def _measure(items: list[tuple[int, Document]], tokenizer: Tokenizer, dtype: Dtype) -> EncodedSplit:
    measured = [tokenizer.encode_measured(item.content) for _, item in items]
    split = _join(items, [ids for ids, _ in measured], tokenizer.document_id, dtype)
    pieces = [np.empty(0, np.uint32)]
    for (_, per_token), (_, item) in zip(measured, items, strict=True):
        pieces += [per_token, np.array([len(item.content) - int(per_token.sum())], np.uint32)]
    split.bytes_per_token = np.concatenate(pieces)
    return split
