"""Files as streams of bytes, whether they are compressed or not."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import IO, Any

from pipelines.errors import InputError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Endings of names that say how a file is compressed."""

_OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class Unpacked:
    """An open file: its text in the order in which it stands there."""

    def __init__(self, path: str, raw: IO[bytes]) -> None:
        self._path = path
        self._raw = raw
        self._stream: Any = _unpacking(path, raw)

    @property
    def source_bytes(self) -> int:
        """Bytes of the file on disk that have been taken in."""
        return self._raw.tell()

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; none at the end. InputError if the file is damaged."""
        try:
            return bytes(self._stream.read(size))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise InputError(self._path, f"cannot be unpacked, it is damaged or incomplete ({error})") from error


@contextmanager
def open_unpacked(path: str) -> Iterator[Unpacked]:
    """Open a file for reading from its start. InputError if it cannot be."""
    try:
        raw = open(path, "rb")  # noqa: SIM115 (closed below; what fails there is not the opening)
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from error
    with raw:
        yield Unpacked(path, raw)


def is_compressed(path: str) -> bool:
    """Whether the name says so."""
    return PurePath(path).suffix.lower() in COMPRESSED


def content_suffix(path: str) -> str:
    """The name's ending that says what the file holds, in lower case: ``.jsonl`` of ``a.jsonl.gz``."""
    pure = PurePath(path)
    return PurePath(pure.stem if is_compressed(path) else pure.name).suffix.lower()


def _unpacking(path: str, raw: IO[bytes]) -> Any:
    suffix = PurePath(path).suffix.lower()
    if suffix == ".zst":
        # Here rather than above: it takes 0.15 s, and most files do not need it.
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    opener = _OPENERS.get(suffix)
    return opener(raw) if opener else raw
