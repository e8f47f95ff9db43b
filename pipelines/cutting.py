"""How a corpus is cut into pieces: by its files alone, so that the number of tasks decides nothing."""

from collections.abc import Iterator

from pipelines.corpus import Corpus, Reading, SourceFile
from pipelines.documents import SNIFFED_BYTES, is_binary
from pipelines.errors import InputError
from pipelines.parquet import read_slowly, row_groups
from pipelines.pieces import Lines, Piece, Range, RowGroups, Rows, Sections, WholeFiles
from pipelines.unpacking import is_compressed, open_unpacked

PIECE_BYTES = 2 * 2**20
"""About so many bytes of text make a piece: a BPE tokenizer takes less than a second for it."""
LARGE_TEXT_BYTES = 2**20
"""A larger text file is divided at line ends."""
_FILES_OF_A_PIECE = 256

# A large text becomes at least about so many documents: one in 20 is held out, and the chance that none is, is 2e-6.
_PARTS_OF_A_TEXT = 256
_LARGEST_PART = 2**20
# Text whose lines are longer is cut within a line, so that memory stays bounded whatever the file is.
_LONGEST_LINE = 8 * 2**20
_READ_BYTES = 2**20
# A row group with more of a column than this is read in steps.
_LARGE_GROUP_BYTES = 8 * PIECE_BYTES
_LINE_END = b"\n"


def cut(corpus: Corpus) -> Iterator[Piece]:
    """The pieces of a corpus, in order. InputError if a file cannot be read as what it is taken for."""
    small: list[SourceFile] = []
    waiting = 0
    for file in corpus.files:
        parts = _parts(file, corpus.reading)
        if parts is None:
            small.append(file)
            waiting += file.size
        if small and (parts is not None or waiting >= PIECE_BYTES or len(small) == _FILES_OF_A_PIECE):
            yield WholeFiles(tuple(small))
            small, waiting = [], 0
        if parts is not None:
            yield from parts
    if small:
        yield WholeFiles(tuple(small))


def _parts(file: SourceFile, reading: Reading) -> Iterator[Piece] | None:
    """The pieces of a file that holds many documents; None if the file is one document."""
    if file.kind == "parquet":
        return _row_pieces(file, reading.field)
    if file.kind == "jsonl":
        return _line_pieces(file)
    text_bytes = _bytes_to_divide(file, reading)
    if text_bytes is None:
        return None
    part_bytes = min(max(text_bytes // _PARTS_OF_A_TEXT, 1), _LARGEST_PART)
    return (
        Sections(file, source_bytes, source, reading.separator, part_bytes)
        for source, source_bytes in _sources(file, reading.separator)
    )


def _bytes_to_divide(file: SourceFile, reading: Reading) -> int | None:
    """Bytes of a text file that is to be divided, None if it is left whole: no text, or small, or meant to be whole."""
    packed = is_compressed(file.path)
    small = file.size <= LARGE_TEXT_BYTES and not packed
    if reading.separator is None and (small or not reading.divided):
        return None
    with open_unpacked(file.path) as stream:
        start = stream.read(SNIFFED_BYTES)
        if not start or is_binary(file, start):
            return None
        if not packed or reading.separator is not None:
            return file.size
        # How large it is decides how it is divided; unpacking takes a hundredth of a tokenizer's time.
        size = len(start)
        while chunk := stream.read(_READ_BYTES):
            size += len(chunk)
    return size if size > LARGE_TEXT_BYTES else None


def _line_pieces(file: SourceFile) -> Iterator[Piece]:
    first = True
    for source, source_bytes in _sources(file, _LINE_END):
        yield Lines(file, source_bytes, source, first)
        first = False


def _sources(file: SourceFile, separator: bytes | None) -> Iterator[tuple[Range | bytes, int]]:
    """Stretches of a file that end behind a separator (None: a line end), and their bytes on disk."""
    if is_compressed(file.path):
        yield from _unpacked_stretches(file, separator)
        return
    try:
        start = 0
        while start < file.size:
            end = _end_of_stretch(file, start + PIECE_BYTES, separator)
            yield Range(file.path, start, end), end - start
            start = end
    except OSError as error:
        raise InputError(file.path, f"cannot be read ({error.strerror})") from error


def _end_of_stretch(file: SourceFile, at: int, separator: bytes | None) -> int:
    if at >= file.size:
        return file.size
    with open(file.path, "rb") as stream:
        stream.seek(at)
        held, searched = bytearray(), 0
        while chunk := stream.read(_READ_BYTES):
            held += chunk
            if (found := _find_end(held, 0, searched, separator)) is not None:
                return at + found
            searched = _still_to_search(held, 0, separator)
    return file.size


def _unpacked_stretches(file: SourceFile, separator: bytes | None) -> Iterator[tuple[bytes, int]]:
    with open_unpacked(file.path) as stream:
        held, searched, accounted = bytearray(), PIECE_BYTES, 0
        while chunk := stream.read(_READ_BYTES):
            held += chunk
            while (end := _find_end(held, PIECE_BYTES, searched, separator)) is not None:
                yield bytes(held[:end]), stream.source_bytes - accounted
                accounted = stream.source_bytes
                del held[:end]
                searched = PIECE_BYTES
            searched = _still_to_search(held, PIECE_BYTES, separator)
        if held:
            yield bytes(held), file.size - accounted


def _find_end(held: bytearray, first: int, searched: int, separator: bytes | None) -> int | None:
    """Where a stretch ends that may end from ``first`` on; None if that is not known yet."""
    mark = separator or _LINE_END
    found = held.find(mark, searched)
    limit = first + _LONGEST_LINE
    if separator is None and (found >= limit or (found < 0 and len(held) >= limit)):
        return _start_of_character(held, limit - 1)
    return found + len(mark) if found >= 0 else None


def _still_to_search(held: bytearray, first: int, separator: bytes | None) -> int:
    # A separator may have begun at the end of what was read.
    return max(first, len(held) - len(separator or _LINE_END) + 1)


def _start_of_character(held: bytearray, at: int) -> int:
    """Where the UTF-8 character at ``at`` begins."""
    start = at
    while start > at - 3 and held[start] & 0xC0 == 0x80:
        start -= 1
    return start


def _row_pieces(file: SourceFile, column: str) -> Iterator[Piece]:
    groups = row_groups(file.path, column)
    all_rows = max(sum(group.rows for group in groups), 1)
    first, rows, column_bytes = 0, 0, 0
    for number, group in enumerate(groups):
        if rows and column_bytes + group.column_bytes > PIECE_BYTES:
            yield RowGroups(file, file.size * rows // all_rows, first, number)
            first, rows, column_bytes = number, 0, 0
        if group.column_bytes > _LARGE_GROUP_BYTES:
            step = max(1, group.rows * PIECE_BYTES // group.column_bytes)
            for contents in read_slowly(file.path, column, number, step):
                yield Rows(file, file.size * len(contents) // all_rows, contents)
            first = number + 1
        else:
            rows, column_bytes = rows + group.rows, column_bytes + group.column_bytes
    if rows:
        yield RowGroups(file, file.size * rows // all_rows, first, len(groups))
