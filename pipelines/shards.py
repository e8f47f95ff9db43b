"""Token shards on disk, read as one stream of tokens for each split.

A folder holds, for ``train`` and for ``validation``:

``SPLIT-00000.bin`` ...     token ids, uint16 or uint32 little-endian, all but the last of equal length; documents are
                            joined, each followed by the document token, and may run across files
``SPLIT.offsets.npy``       int64 [documents + 1]: where each document starts in the stream, and where the last ends
``SPLIT.names.json``        the documents' names
``SPLIT.text_bytes.bin``    uint32 per token: bytes of text behind it (0 for a document token); validation only
``tokenizer.json``          the tokenizer, unless a token is a byte

and ``manifest.json``, written last. What has no manifest is no corpus.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.config import SourceConfig
from pipelines.errors import UserError

MANIFEST = "manifest.json"
FORMAT: Final = 1
Dtype = Literal["uint16", "uint32"]
Split = Literal["train", "validation"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """One file of the folder."""

    name: str
    size_bytes: int
    sha256: str


class SplitManifest(_Record):
    """One split: its size and its files."""

    documents: int
    tokens: int
    """Document tokens included."""
    text_bytes: int
    shards: list[FileRecord]
    offsets: FileRecord
    names: FileRecord
    token_bytes: FileRecord | None

    def files(self) -> list[FileRecord]:
        """Every file of the split."""
        return [*self.shards, self.offsets, self.names, *([self.token_bytes] if self.token_bytes else [])]


class TokenizerManifest(_Record):
    """The tokenizer that made the ids."""

    name: str
    sha256: str | None
    vocab_size: int
    document_token: str
    document_id: int
    file: FileRecord | None = None
    """A copy of the tokenizer, if it is a file."""


class Manifest(_Record):
    """What a folder of shards holds and what it was made from."""

    format: Literal[1] = FORMAT
    corpus: SourceConfig
    corpus_digest: str
    """SHA-256 over the names and contents of all documents, in order."""
    python: str
    """Version of the interpreter that prepared it: the standard library is its own."""
    tokenizer: TokenizerManifest
    dtype: Dtype
    shard_tokens: int
    train: SplitManifest
    validation: SplitManifest
    preparation: str | None = None
    """Of ``steadymoe prepare``: digest over the source files' state and the options, to know the same request again."""

    def files(self) -> list[FileRecord]:
        """Every file but the manifest."""
        copy = [self.tokenizer.file] if self.tokenizer.file else []
        return self.train.files() + self.validation.files() + copy


class DocumentSpan(NamedTuple):
    """A piece of one document; its document token counts as its last token."""

    name: str
    start: int
    """First token, counted from the document's first."""
    end: int
    """One past the last token."""


class TokenStream:
    """One split as a single sequence of tokens. Send the folder's path to other processes rather than this object."""

    def __init__(self, folder: Path, split: Split, manifest: Manifest) -> None:
        self.split: Split = split
        self.manifest: SplitManifest = manifest.train if split == "train" else manifest.validation
        self.document_id = manifest.tokenizer.document_id
        self._folder = folder
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._shard_tokens = manifest.shard_tokens

    def __len__(self) -> int:
        """Tokens."""
        return self.manifest.tokens

    def read(self, start: int, stop: int) -> NDArray[np.integer[Any]]:
        """Tokens ``start`` to ``stop`` (exclusive); a view of the mapped file where they lie in one."""
        self._check(start, stop)
        pieces = list(self._pieces(start, stop))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def documents(self, start: int, stop: int) -> list[DocumentSpan]:
        """Which documents tokens ``start`` to ``stop`` (exclusive) belong to, in order."""
        self._check(start, stop)
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        last = int(np.searchsorted(self._offsets, stop, side="left"))
        spans = []
        for document in range(first, last):
            begin, end = (int(offset) for offset in self._offsets[document : document + 2])
            spans.append(DocumentSpan(self._names[document], max(start, begin) - begin, min(stop, end) - begin))
        return spans

    def text_bytes(self, start: int, stop: int) -> int:
        """Bytes of text behind tokens ``start`` to ``stop`` (exclusive), exactly; known for validation only."""
        self._check(start, stop)
        return int(self._token_bytes[start:stop].sum(dtype=np.int64))

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start < stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")

    def _pieces(self, start: int, stop: int) -> Iterator[NDArray[np.integer[Any]]]:
        while start < stop:
            shard, at = divmod(start, self._shard_tokens)
            piece = self._shards[shard][at : at + stop - start]
            start += len(piece)
            yield piece

    @cached_property
    def _shards(self) -> list[NDArray[np.integer[Any]]]:
        return [_mapped(self._folder / shard.name, self._dtype) for shard in self.manifest.shards]

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        offsets: NDArray[np.int64] = np.load(self._folder / self.manifest.offsets.name, mmap_mode="r")
        return offsets

    @cached_property
    def _names(self) -> list[str]:
        names: list[str] = json.loads((self._folder / self.manifest.names.name).read_bytes())
        return names

    @cached_property
    def _token_bytes(self) -> NDArray[np.uint32]:
        if self.manifest.token_bytes is None:
            raise ValueError(f"bytes behind each token are not kept for the {self.split} split")
        return _mapped(self._folder / self.manifest.token_bytes.name, np.dtype("<u4"))


class Shards:
    """An opened folder."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.train = TokenStream(folder, "train", manifest)
        self.validation = TokenStream(folder, "validation", manifest)


def open_shards(folder: Path, verify: bool = False) -> Shards:
    """Opens prepared shards after checking that every file is there with its size (and its SHA-256, with ``verify``).

    Raises UserError naming the file that is missing, truncated or altered.
    """
    manifest = _read_manifest(folder / MANIFEST)
    for record in manifest.files():
        path = folder / record.name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise UserError(f"{path} is missing; {_advice(folder)}")
        if size != record.size_bytes:
            raise UserError(f"{path} has {size} bytes instead of {record.size_bytes}; {_advice(folder)}")
        if verify and _sha256(path) != record.sha256:
            raise UserError(f"{path} does not have the checksum in {MANIFEST}; {_advice(folder)}")
    return Shards(folder, manifest)


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    # As a plain array: a slice of np.memmap itself takes several times as long.
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _advice(folder: Path) -> str:
    return f"delete {folder} and have it prepared again"


def _read_manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {path.parent} holds no prepared corpus") from error
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "JSON"
        problem = f"{path} is not a manifest of format {FORMAT} (wrong at {where})"
        raise UserError(f"{problem}; {_advice(path.parent)}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
