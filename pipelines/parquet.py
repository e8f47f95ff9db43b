"""One column of text in a Parquet file. pyarrow is imported when the first such file is met: it takes 0.15 s."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from pipelines.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


class RowGroup(NamedTuple):
    """Rows that lie together in the file, and the bytes of the column in them."""

    rows: int
    column_bytes: int


def row_groups(path: str, column: str) -> list[RowGroup]:
    """The file's row groups, without reading them. InputError if it is no Parquet file or has no such text column."""
    with _opened(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
        if column not in schema.names:
            raise InputError(path, f"has no column {column!r}; its columns are {', '.join(schema.names) or 'none'}")
        kind = schema.field(column).type
        if not _is_text(kind):
            raise InputError(path, f"column {column!r} holds {kind}, not text")
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        return [
            RowGroup(
                group.num_rows,
                sum(
                    group.column(at).total_uncompressed_size
                    for at in range(group.num_columns)
                    if group.column(at).path_in_schema == column
                ),
            )
            for group in groups
        ]


def read_groups(path: str, column: str, first: int, end: int) -> Iterator[bytes | None]:
    """The column in row groups ``first`` to ``end`` (exclusive), row by row; None for a null."""
    with _opened(path) as file:
        for values in file.read_row_groups(list(range(first, end)), columns=[column], use_threads=False)[column].chunks:
            yield from _contents(values)


def read_slowly(path: str, column: str, group: int, rows: int) -> Iterator[list[bytes | None]]:
    """The column in one row group, ``rows`` at a time, without ever holding the whole."""
    with _opened(path) as file:
        for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=[column], use_threads=False):
            yield _contents(batch.column(0))


@contextmanager
def _opened(path: str) -> Iterator["pq.ParquetFile"]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(path, f"cannot be read as Parquet, is it damaged? ({first_line})") from error


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    binaries = (types.is_binary, types.is_large_binary, types.is_binary_view)
    return any(test(kind) for test in (*strings, *binaries))


def _contents(values: "pa.Array") -> list[bytes | None]:
    import pyarrow as pa

    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    # As bytes: a file may hold text that is not UTF-8, and nothing needs it decoded here.
    contents: list[bytes | None] = values.cast(pa.large_binary()).to_pylist()
    return contents
