"""From a piece of the corpus to its documents: text files, divided text, JSON lines, Parquet rows."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipelines.corpus import Reading, SourceFile
from pipelines.errors import InputError
from pipelines.pieces import Lines, Piece, RowGroups, Rows, Sections, WholeFiles
from pipelines.unpacking import open_unpacked

VALIDATION_FRACTION = 0.05
"""About this share of the documents is held out."""

# git's rule for telling binary files from text: a NUL among the first 8000 bytes.
SNIFFED_BYTES = 8000
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LINE_ENDS = b"\r\n"


@dataclass(frozen=True, slots=True)
class Document:
    """One document's content."""

    content: bytes
    digest: bytes
    """SHA-256 of the content."""

    @property
    def held_out(self) -> bool:
        """Whether the document belongs to validation: decided by its content alone.

        A decision by content keeps copies of one text (vendored modules, equal licence files) in the same split, so
        that no text of training is validated on; it does not change when files are moved or other documents are added.
        """
        return int.from_bytes(self.digest[:8]) < VALIDATION_FRACTION * 2**64


@dataclass(slots=True)
class Found:
    """The documents of a piece, in order."""

    documents: list[Document] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """Which file, line, row or section of the piece each one is, from 0."""
    units: int = 0
    """Files, lines, rows or sections in all; those without text are no documents."""
    binary_files: int = 0

    def add(self, content: bytes) -> None:
        """The next unit."""
        if content:
            self.documents.append(Document(content, hashlib.sha256(content).digest()))
            self.places.append(self.units)
        self.units += 1


def read_documents(piece: Piece, reading: Reading) -> Found:
    """Read a piece. InputError if it is not what it is taken for; its place is counted from the piece's start."""
    found = Found()
    match piece:
        case WholeFiles():
            for file in piece.files:
                content = _whole(file)
                found.binary_files += content is None
                found.add(content or b"")
        case Sections():
            for section in _sections(piece.content(), piece.separator, piece.part_bytes):
                found.add(section)
        case Lines():
            _read_lines(found, piece, reading.field)
        case RowGroups() | Rows():
            _read_rows(found, piece, reading.field)
    return found


def is_binary(file: SourceFile, start: bytes) -> bool:
    """Whether a file that begins so is no text. InputError if the user named this very file."""
    if b"\0" not in start[:SNIFFED_BYTES]:
        return False
    if file.named:
        raise InputError(
            file.path, "is not a text file (it contains NUL bytes); text, JSON lines (.jsonl) and Parquet can be read"
        )
    return True


def _whole(file: SourceFile) -> bytes | None:
    with open_unpacked(file.path) as stream:
        pieces = [stream.read(SNIFFED_BYTES)]
        if is_binary(file, pieces[0]):
            return None
        while pieces[-1]:
            pieces.append(stream.read(2**24))
    return b"".join(pieces)


def _sections(content: bytes, separator: bytes | None, part_bytes: int) -> Iterator[bytes]:
    """Documents of a divided text: between separators, without the line ends beside them; or parts of lines."""
    if separator is not None:
        for section in content.split(separator):
            yield section.strip(_LINE_ENDS)
        return
    start = 0
    while start < len(content):
        line_end = content.find(b"\n", start + part_bytes - 1)
        end = line_end + 1 or len(content)
        yield content[start:end]
        start = end


def _read_lines(found: Found, piece: Lines, field_name: str) -> None:
    lines = piece.content().removeprefix(_BYTE_ORDER_MARK if piece.first else b"").split(b"\n")
    if not lines[-1]:
        lines.pop()
    for line in lines:
        try:
            found.add(_text_of(line, field_name) if line.strip() else b"")
        except ValueError as error:
            raise InputError(piece.file.path, str(error), "line", found.units + 1) from None


def _text_of(line: bytes, field_name: str) -> bytes:
    """The document of a JSON line. ValueError if there is none."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ValueError(f"cannot be read as JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"should be a JSON object such as {{{json.dumps(field_name)}: ...}}, got {_json_type(record)}")
    if field_name not in record:
        raise ValueError(f"has no field {field_name!r}; its fields are {', '.join(record) or 'none'}")
    text = record[field_name]
    if not isinstance(text, str):
        raise ValueError(f"field {field_name!r} should be text, got {_json_type(text)}")
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _json_type(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")


def _read_rows(found: Found, piece: RowGroups | Rows, field_name: str) -> None:
    for content in piece.contents(field_name):
        if content is None:
            raise InputError(piece.file.path, f"column {field_name!r} should be text, got null", "row", found.units)
        found.add(content)
