"""Writes the token shards of one split; the format is described in ``pipelines.shards``."""

import hashlib
import io
import json
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


class SplitWriter:
    """Takes documents one by one. ``measured`` keeps the bytes of text behind every token."""

    def __init__(
        self, folder: Path, split: Split, dtype: Dtype, document_id: int, shard_tokens: int, measured: bool
    ) -> None:
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._document_id = document_id
        self._shard_tokens = shard_tokens
        self._names: list[str] = []
        self._offsets = [0]
        self._text_bytes = 0
        self._closed_shards: list[FileRecord] = []
        self._shard: _CheckedFile | None = None
        self._token_bytes = _CheckedFile(folder / f"{split}.text_bytes.bin") if measured else None

    def add(
        self, name: str, ids: NDArray[np.integer[Any]], text_bytes: int, per_token: NDArray[np.uint32] | None = None
    ) -> None:
        """Appends a document of ``text_bytes`` bytes; ``per_token`` [len(ids)] says where they are, if measured.

        Text that no token stands for (dropped at the document's end) counts with the document token.
        """
        stored = np.append(ids.astype(self._dtype), self._dtype.type(self._document_id))
        self._append(stored)
        self._names.append(name)
        self._offsets.append(self._offsets[-1] + len(stored))
        self._text_bytes += text_bytes
        if self._token_bytes is not None:
            if per_token is None:
                raise ValueError("a measured split needs the bytes behind every token")
            rest = np.uint32(text_bytes - int(per_token.sum()))
            self._token_bytes.write(np.append(per_token, rest).astype("<u4").tobytes())

    def close(self) -> SplitManifest:
        """Finishes all files and describes them."""
        if self._shard is not None:
            self._closed_shards.append(self._shard.close())
        buffer = io.BytesIO()
        np.save(buffer, np.array(self._offsets, np.int64))
        return SplitManifest(
            documents=len(self._names),
            tokens=self._offsets[-1],
            text_bytes=self._text_bytes,
            shards=self._closed_shards,
            offsets=self._write_whole(f"{self._split}.offsets.npy", buffer.getvalue()),
            names=self._write_whole(f"{self._split}.names.json", json.dumps(self._names).encode()),
            token_bytes=self._token_bytes.close() if self._token_bytes is not None else None,
        )

    def _append(self, tokens: NDArray[np.integer[Any]]) -> None:
        written, at = 0, self._offsets[-1]
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

    def _write_whole(self, name: str, content: bytes) -> FileRecord:
        file = _CheckedFile(self._folder / name)
        file.write(content)
        return file.close()
