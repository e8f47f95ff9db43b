"""Pieces of work that a corpus is cut into: what a task is given, and what its documents are called.

A piece names a part of a file for its task to read; the text itself goes along where a part cannot be read alone, which
is so in compressed files and in large row groups of Parquet.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pipelines.corpus import SourceFile
from pipelines.errors import InputError
from pipelines.parquet import read_groups


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes ``start`` to ``end`` of a file that is not compressed."""

    path: str
    start: int
    end: int

    def read(self) -> bytes:
        """The bytes. InputError if the file is not readable any more."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                return file.read(self.end - self.start)
        except OSError as error:
            raise InputError(self.path, f"cannot be read ({error.strerror})") from error


@dataclass(frozen=True, slots=True)
class WholeFiles:
    """Small text files, each of them a document."""

    files: tuple[SourceFile, ...]

    def name(self, place: int, before: int) -> str:
        """The name of the document at ``place``."""
        return self.files[place].name

    @property
    def source_bytes(self) -> int:
        """Bytes of the files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class _PartOfAFile:
    file: SourceFile
    source_bytes: int
    """Bytes of the file on disk that this piece stands for."""

    numbered_from: ClassVar[int] = 1

    def name(self, place: int, before: int) -> str:
        """The name of the document at ``place``, with ``before`` lines, rows or sections before this piece."""
        return f"{self.file.name}:{before + place + self.numbered_from}"


@dataclass(frozen=True, slots=True)
class Lines(_PartOfAFile):
    """Whole lines of a JSON-lines file."""

    source: Range | bytes
    first: bool
    """Whether they are the file's first."""

    def content(self) -> bytes:
        """Their bytes."""
        return self.source if isinstance(self.source, bytes) else self.source.read()


@dataclass(frozen=True, slots=True)
class Sections(_PartOfAFile):
    """Whole documents of a text file that holds many."""

    source: Range | bytes
    separator: bytes | None
    """Stands between documents; None divides at line ends."""
    part_bytes: int
    """Least size of a document that is divided at line ends."""

    def content(self) -> bytes:
        """Their bytes."""
        return self.source if isinstance(self.source, bytes) else self.source.read()


@dataclass(frozen=True, slots=True)
class RowGroups(_PartOfAFile):
    """Row groups of a Parquet file."""

    first: int
    end: int
    numbered_from: ClassVar[int] = 0  # as every data frame numbers them

    def contents(self, column: str) -> Iterator[bytes | None]:
        """The column, row by row."""
        return read_groups(self.file.path, column, self.first, self.end)


@dataclass(frozen=True, slots=True)
class Rows(_PartOfAFile):
    """Rows of a Parquet file, read already."""

    rows: list[bytes | None]
    numbered_from: ClassVar[int] = 0

    def contents(self, column: str) -> Iterator[bytes | None]:
        """The rows."""
        return iter(self.rows)


Piece = WholeFiles | Lines | Sections | RowGroups | Rows
