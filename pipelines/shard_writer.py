"""Writes the token shards of one split; the format is described in ``pipelines.shards``."""

import hashlib
import io
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.shards import Dtype, FileRecord, Split, SplitManifest


class _CheckedFile:
    """A new file whose size and checksum are taken while it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")
        self._sha256 = hashlib.sha256()
        self._size = 0

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self._size += len(content)

    def close(self) -> FileRecord:
        self._file.close()
        return FileRecord(name=self._path.name, size_bytes=self._size, sha256=self._sha256.hexdigest())


def write_checked(path: Path, content: bytes) -> FileRecord:
    """Writes a new file and describes it."""
    file = _CheckedFile(path)
    file.write(content)
    return file.close()


class SplitWriter:
    """Takes documents one by one or many at a time. ``measured`` keeps the bytes of text behind every token.

    Memory grows by 8 bytes a document.
    """

    def __init__(self, folder: Path, split: Split, dtype: Dtype, shard_tokens: int, measured: bool) -> None:
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._offsets = array("q", [0])
        self._text_bytes = 0
        self._closed_shards: list[FileRecord] = []
        self._shard: _CheckedFile | None = None
        self._names = _CheckedFile(folder / f"{split}.names.json")
        self._token_bytes = _CheckedFile(folder / f"{split}.text_bytes.bin") if measured else None

    def add(
        self,
        names: Sequence[str],
        lengths: NDArray[np.int64],
        tokens: NDArray[np.integer[Any]],
        text_bytes: int,
        bytes_per_token: NDArray[np.uint32] | None = None,
    ) -> None:
        """Appends documents.

        Args:
            names: of the documents.
            lengths: tokens of each, its document token included; [len(names)].
            tokens: of all of them, joined; [sum(lengths)].
            text_bytes: bytes of text in all of them.
            bytes_per_token: bytes behind every token, [sum(lengths)]; for a measured split alone.
        """
        if not len(names):
            return
        quoted = ", ".join(json.dumps(name) for name in names)
        self._names.write(((", " if len(self._offsets) > 1 else "[") + quoted).encode())
        end = self._offsets[-1]
        self._append(tokens.astype(self._dtype, copy=False), end)
        self._offsets.extend((end + np.cumsum(lengths)).tolist())
        self._text_bytes += text_bytes
        if self._token_bytes is not None:
            if bytes_per_token is None:
                raise ValueError("a measured split needs the bytes behind every token")
            self._token_bytes.write(bytes_per_token.astype("<u4", copy=False).tobytes())

    def close(self) -> SplitManifest:
        """Finishes all files and describes them."""
        if self._shard is not None:
            self._closed_shards.append(self._shard.close())
        documents = len(self._offsets) - 1
        self._names.write(b"]" if documents else b"[]")
        buffer = io.BytesIO()
        np.save(buffer, np.array(self._offsets, np.int64))
        return SplitManifest(
            documents=documents,
            tokens=self._offsets[-1],
            text_bytes=self._text_bytes,
            shards=self._closed_shards,
            offsets=write_checked(self._folder / f"{self._split}.offsets.npy", buffer.getvalue()),
            names=self._names.close(),
            token_bytes=self._token_bytes.close() if self._token_bytes is not None else None,
        )

    def _append(self, tokens: NDArray[np.integer[Any]], at: int) -> None:
        written = 0
        while written < len(tokens):
            number, filled = divmod(at + written, self._shard_tokens)
            if filled == 0:
                if self._shard is not None:
                    self._closed_shards.append(self._shard.close())
                self._shard = _CheckedFile(self._folder / f"{self._split}-{number:05d}.bin")
            assert self._shard is not None
            piece = tokens[written : written + self._shard_tokens - filled]
            self._shard.write(piece.tobytes())
            written += len(piece)
