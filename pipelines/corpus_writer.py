"""Encoded pieces -> a complete folder of shards with its manifest."""

import hashlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from pipelines.config import SourceConfig
from pipelines.corpus import Corpus
from pipelines.cutting import cut
from pipelines.encoding import EncodedPiece, EncodingJob, encode_piece, placed
from pipelines.errors import InputError, UserError
from pipelines.paths import absolute
from pipelines.pieces import Piece
from pipelines.shard_writer import SplitWriter, write_checked
from pipelines.shards import MANIFEST, Dtype, Manifest, TokenizerManifest
from pipelines.tasks import Runner
from pipelines.tokenizer import BYTE, fingerprint, load_tokenizer

SHARD_BYTES = 64 * 2**20
TOKENIZER_FILE = "tokenizer.json"

# Called with the bytes of source files done so far and in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _HeldOut:
    """A document for validation, whose tokens wait in a file."""

    digest: bytes
    name: str
    start: int
    tokens: int
    text_bytes: int


class CorpusWriter:
    """Takes encoded pieces in order.

    Validation reads from its stream's start up to a limit. In the order of names that would be one neighbourhood of the
    corpus; in the order of digests it is a sample of all of it. So held-out tokens wait in a file until all are known.
    """

    def __init__(self, folder: Path, dtype: Dtype, shard_bytes: int) -> None:
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self.shard_tokens = shard_bytes // self._dtype.itemsize
        self._folder = folder
        self._train = SplitWriter(folder, "train", dtype, self.shard_tokens, measured=False)
        self._validation = SplitWriter(folder, "validation", dtype, self.shard_tokens, measured=True)
        self._digest = hashlib.sha256()
        self._held_out: list[_HeldOut] = []
        self._waiting_tokens = 0
        self.binary_files = 0

    def write(self, pieces: Iterator[tuple[Piece, EncodedPiece | InputError]]) -> Iterator[int]:
        """Append the pieces; yields each one's bytes of source. Raises what a piece found wrong with its file."""
        with (self._folder / "waiting.ids").open("xb") as ids, (self._folder / "waiting.bytes").open("xb") as widths:
            for piece, units_before, encoded in placed(pieces):
                self._add(piece, units_before, encoded, ids, widths)
                yield piece.source_bytes

    def _add(self, piece: Piece, units_before: int, encoded: EncodedPiece, ids: IO[bytes], widths: IO[bytes]) -> None:
        names = [piece.name(place, units_before) for place in encoded.places]
        for name, digest in zip(names, encoded.digests, strict=True):
            self._digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + digest)
        self.binary_files += encoded.binary_files
        train, validation = encoded.train, encoded.validation
        self._train.add(
            [names[member] for member in train.members], train.lengths, train.tokens, int(train.text_bytes.sum())
        )
        assert validation.bytes_per_token is not None
        ids.write(validation.tokens.astype(self._dtype, copy=False).tobytes())
        widths.write(validation.bytes_per_token.astype("<u4", copy=False).tobytes())
        for member, length, text_bytes in zip(
            validation.members, validation.lengths.tolist(), validation.text_bytes.tolist(), strict=True
        ):
            self._held_out.append(
                _HeldOut(encoded.digests[member], names[member], self._waiting_tokens, length, text_bytes)
            )
            self._waiting_tokens += length

    def close(
        self, config: SourceConfig, corpus: Corpus, tokenizer: TokenizerManifest, preparation: str | None
    ) -> Manifest:
        """Write what waits, then the manifest. UserError if a split is empty."""
        self._write_held_out()
        manifest = Manifest(
            corpus=config,
            corpus_digest=self._digest.hexdigest(),
            python=platform.python_version(),
            tokenizer=tokenizer,
            dtype="uint16" if self._dtype.itemsize == 2 else "uint32",
            shard_tokens=self.shard_tokens,
            train=self._train.close(),
            validation=self._validation.close(),
            preparation=preparation,
        )
        _check_both_splits(manifest, corpus)
        (self._folder / MANIFEST).write_text(manifest.model_dump_json(indent=2))
        return manifest

    def _write_held_out(self) -> None:
        ids_path, widths_path = self._folder / "waiting.ids", self._folder / "waiting.bytes"
        with ids_path.open("rb") as ids, widths_path.open("rb") as widths:
            for waiting in sorted(self._held_out, key=lambda item: (item.digest, item.name)):
                ids.seek(waiting.start * self._dtype.itemsize)
                widths.seek(waiting.start * 4)
                self._validation.add(
                    [waiting.name],
                    np.array([waiting.tokens], np.int64),
                    np.frombuffer(ids.read(waiting.tokens * self._dtype.itemsize), self._dtype),
                    waiting.text_bytes,
                    np.frombuffer(widths.read(waiting.tokens * 4), "<u4"),
                )
        ids_path.unlink()
        widths_path.unlink()


def write_corpus(
    folder: Path,
    config: SourceConfig,
    corpus: Corpus,
    tokenizer: str,
    document_token: str | None,
    run: Runner,
    *,
    shard_bytes: int = SHARD_BYTES,
    preparation: str | None = None,
    progress: Progress | None = None,
) -> tuple[Manifest, int]:
    """Prepare a corpus in an empty folder; the manifest, and how many files were left out for being binary.

    The bytes that are written depend on the documents and the tokenizer alone, and not on how ``run`` works.

    Raises:
        UserError: a file or the tokenizer is wrong, there is no text for one of the splits, or a file changed.
    """
    if tokenizer != BYTE:
        tokenizer = absolute(tokenizer)  # a task has another working directory
    loaded = load_tokenizer(tokenizer, document_token)
    dtype: Dtype = "uint16" if loaded.vocab_size <= 2**16 else "uint32"
    job = EncodingJob(corpus.reading, tokenizer, document_token, fingerprint(tokenizer, document_token), dtype)
    writer = CorpusWriter(folder, dtype, shard_bytes)
    total, done = corpus.size_bytes, 0
    for source_bytes in writer.write(run(encode_piece, job, cut(corpus))):
        done += source_bytes
        if progress is not None:
            progress(done, total)
    corpus.check_unchanged()
    if progress is not None:
        progress(total, total)
    content = loaded.file_content
    record = TokenizerManifest(
        name=loaded.name,
        sha256=loaded.sha256,
        vocab_size=loaded.vocab_size,
        document_token=loaded.document_token,
        document_id=loaded.document_id,
        file=write_checked(folder / TOKENIZER_FILE, content) if content is not None else None,
    )
    return writer.close(config, corpus, record, preparation), writer.binary_files


def _check_both_splits(manifest: Manifest, corpus: Corpus) -> None:
    documents = manifest.train.documents + manifest.validation.documents
    if documents == 0:
        raise UserError(f"{corpus.places}: no file there holds any text")
    for split, held in (("training", manifest.train), ("validation", manifest.validation)):
        if held.documents == 0:
            raise UserError(
                f"{corpus.places}: none of the {documents} documents falls to {split} (about one in 20 is held out, "
                "chosen by its content); give more of them, or divide text files by a separator"
            )
