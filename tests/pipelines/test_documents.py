"""Every way in which documents are stored gives the documents that were put there."""

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import cutting
from pipelines.config import FileFormat, FilesCorpusConfig
from pipelines.corpus import open_corpus
from pipelines.documents import read_documents
from pipelines.encoding import placed, training_texts
from pipelines.errors import InputError, UserError
from pipelines.pieces import WholeFiles

TEXTS = [
    "a",
    "two\nlines\n",
    "",
    "café 🙂",
    "tab\tand \x00 NUL",
    "  spaces  ",
    "x" * 5000,
    "\u2028 separators \x85",
    "last",
]


def _zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": _zst,
    # Tools that compress in parallel write a file of many members.
    ".members.gz": lambda content: gzip.compress(content[:100]) + gzip.compress(content[100:]),
    ".members.zst": lambda content: _zst(content[:100]) + _zst(content[100:]),
}


def read(
    path: Path, *, field: str = "text", separator: str | None = None, file_format: FileFormat = "auto"
) -> list[tuple[str, str]]:
    """Names and texts of the documents of a file or folder."""
    config = FilesCorpusConfig(paths=[str(path)], field=field, separator=separator, format=file_format)
    corpus = open_corpus(config)
    documents, before, path_before = [], 0, ""
    for piece in cutting.cut(corpus):
        here = "" if isinstance(piece, WholeFiles) else piece.file.path
        before = before if here == path_before else 0
        found = read_documents(piece, corpus.reading)
        for place, document in zip(found.places, found.documents, strict=True):
            documents.append((piece.name(place, before), document.content.decode()))
        before, path_before = before + found.units, here
    return documents


def _lines(texts: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, field: text}).encode() + b"\n" for text in texts)


def _numbered(texts: list[str], name: str, first: int) -> list[tuple[str, str]]:
    return [(f"{name}:{number}", text) for number, text in enumerate(texts, first) if text]


@pytest.fixture(params=[50, 7000, 2**21], ids=["pieces of 50", "pieces of 7000", "one piece"])
def _piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "PIECE_BYTES", request.param)
    monkeypatch.setattr(cutting, "_LARGE_GROUP_BYTES", 8 * request.param)


@pytest.mark.usefixtures("_piece_bytes")
@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_a_line_of_json_is_a_document_however_it_is_packed(tmp_path: Path, packing: str, suffix: str) -> None:
    members, _, compression = packing.rpartition(".")
    path = tmp_path / f"data{members}{suffix}{'.' * bool(compression)}{compression}"
    path.write_bytes(PACKERS[packing](_lines(TEXTS * 40)))
    assert read(path) == _numbered(TEXTS * 40, path.name, 1)


def test_json_lines_may_end_as_on_windows_be_blank_and_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \r\n{"text": "b"}')
    assert read(tmp_path / "a.jsonl") == [("a.jsonl:1", "a"), ("a.jsonl:4", "b")]


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a \\ud83d b \\ud83d\\ude42"}\n')
    assert read(tmp_path / "a.jsonl") == [("a.jsonl:1", "a \ufffd b 🙂")]


def test_the_field_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(["one"], "content"))
    pq.write_table(pa.table({"text": [1], "content": ["two"]}), tmp_path / "b.parquet")
    assert read(tmp_path, field="content") == [("a.jsonl:1", "one"), ("b.parquet:0", "two")]


def test_the_format_is_chosen_against_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(_lines(["one"]))
    (tmp_path / "b.jsonl").write_bytes(_lines(["two"]))
    assert [text for _, text in read(tmp_path, file_format="jsonl")] == ["one", "two"]
    assert [name for name, _ in read(tmp_path, file_format="text")] == ["a.txt", "b.jsonl"]


@pytest.mark.usefixtures("_piece_bytes")
@pytest.mark.parametrize("rows_of_a_group", [1, 7, 100, 1000])
@pytest.mark.parametrize(
    "kind",
    [
        pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_of_parquet_is_a_document(tmp_path: Path, rows_of_a_group: int, kind: pa.DataType) -> None:
    texts = TEXTS * 40
    encoded = [text.encode() for text in texts]
    column = pa.array(encoded, pa.large_binary()) if "binary" in str(kind) else pa.array(texts, pa.large_string())
    table = pa.table({"id": range(len(texts)), "text": column.cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=rows_of_a_group)
    assert read(tmp_path / "a.parquet") == _numbered(texts, "a.parquet", 0)


@pytest.mark.usefixtures("_piece_bytes")
@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n", "\n", "é"])
def test_separated_text_is_the_stretches_between(tmp_path: Path, separator: str, packing: str) -> None:
    rng = random.Random(1)
    text = separator.join("".join(rng.choices("ab <|>éx", k=rng.randint(0, 120))) for _ in range(300))
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(PACKERS[packing](text.encode()))
    expected = [section.strip("\r\n") for section in text.split(separator)]
    assert [content for _, content in read(path, separator=separator)] == [section for section in expected if section]


@pytest.mark.usefixtures("_piece_bytes")
@pytest.mark.parametrize("packing", PACKERS)
def test_a_large_text_is_divided_at_line_ends_into_hundreds_of_documents(
    tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "LARGE_TEXT_BYTES", 50_000)
    rng = random.Random(2)
    text = "".join("é" * rng.randint(0, 60) + "\n" for _ in range(2000))
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(PACKERS[packing](text.encode()))
    documents = [content for _, content in read(path)]
    assert "".join(documents) == text
    assert all(content.endswith("\n") for content in documents)
    part = len(text.encode()) // 256
    assert 150 < len(documents) <= 256 + len(text.encode()) // 50
    assert max(len(content.encode()) for content in documents) <= part + 121


def test_a_text_that_is_not_large_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("line\n" * 200_000)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"line\n" * 200_000))
    assert [name for name, _ in read(tmp_path)] == ["a.txt", "b.txt.gz"]


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_a_line_without_end_is_cut_between_characters(
    tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "PIECE_BYTES", 2**20)
    monkeypatch.setattr(cutting, "_LONGEST_LINE", 2**20)
    text = "a🙂é" * 700_000
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(PACKERS[packing](text.encode()))
    documents = [content for _, content in read(path)]
    assert "".join(documents) == text
    assert len(documents) == 3
    assert max(len(content.encode()) for content in documents) <= 2 * 2**20


def test_pieces_account_for_the_bytes_of_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "PIECE_BYTES", 1000)
    for packing, pack in PACKERS.items():
        (tmp_path / f"a.jsonl{packing}").write_bytes(pack(_lines(TEXTS * 40)))
    (tmp_path / "b.txt").write_text("text")
    corpus = open_corpus(FilesCorpusConfig(paths=[str(tmp_path)]))
    assert sum(piece.source_bytes for piece in cutting.cut(corpus)) == corpus.size_bytes


def test_many_small_files_make_few_pieces(tmp_path: Path) -> None:
    for number in range(600):
        (tmp_path / f"{number}.txt").write_text("text")
    assert len(list(cutting.cut(open_corpus(FilesCorpusConfig(paths=[str(tmp_path)]))))) == 3


def _fails(path: Path) -> str:
    corpus = open_corpus(FilesCorpusConfig(paths=[str(path)]))
    pieces = ((piece, training_texts(corpus.reading, piece)) for piece in cutting.cut(corpus))
    with pytest.raises(UserError) as caught:
        list(placed(pieces))
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "b"', ": is not JSON (Expecting ',' delimiter, column 13)"),
        (b"[1]", ': should be a JSON object such as {"text": ...}, got a list'),
        (b'{"content": "b", "id": 2}', ": has no field 'text'; its fields are content, id"),
        (b'{"text": 3}', ": field 'text' should be text, got a number"),
        (b'{"text": null}', ": field 'text' should be text, got null"),
        (b'{"text": "caf\xe9"}', ": is not UTF-8 text (byte 14 of the line)"),
        (b"[" * 100_000, ": cannot be read as JSON (maximum recursion depth exceeded"),
        (b'{"text": ' + b"1" * 5000 + b"}", ": cannot be read as JSON (Exceeds the limit"),
    ],
    ids=range(8),
)
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_a_wrong_line_is_named_by_its_number_in_the_file(
    tmp_path: Path, line: bytes, problem: str, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "PIECE_BYTES", 200)
    path = tmp_path / f"a.jsonl{packing}"
    good = _lines(["good"] * 50)
    path.write_bytes(PACKERS[packing](good + line + b"\n" + good))
    assert _fails(path).startswith(f", line 51{problem}")


def test_a_wrong_row_is_named_by_its_number_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "PIECE_BYTES", 50)
    pq.write_table(pa.table({"text": [*"a" * 40, None]}), tmp_path / "a.parquet", row_group_size=10)
    assert _fails(tmp_path / "a.parquet") == ", row 40: column 'text' should be text, got null"


def test_parquet_without_the_column_or_with_one_that_is_no_text_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nothing of it")
    assert _fails(tmp_path / "a.parquet") == ": has no column 'text'; its columns are body, id"
    assert _fails(tmp_path / "b.parquet") == ": column 'text' holds int64, not text"
    assert _fails(tmp_path / "c.parquet").startswith(": cannot be read as Parquet, is it damaged?")


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, suffix: str, compression: str) -> None:
    rng = random.Random(3)
    packed = PACKERS[compression](_lines(["".join(rng.choices("abcdef ", k=100)) for _ in range(1000)]))
    path = tmp_path / f"a{suffix}{compression}"
    for damaged in (packed[: len(packed) // 2], b"no such thing at all"):
        path.write_bytes(damaged)
        assert _fails(path).startswith(": cannot be unpacked, it is damaged or incomplete")


def test_json_over_many_lines_is_refused_if_it_was_named_and_text_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n  "text": "x"\n}\n')
    with pytest.raises(InputError, match="not a record in each line"):
        read(tmp_path / "a.json")
    assert read(tmp_path) == [("a.json", '{\n  "text": "x"\n}\n')]
    assert len(read(tmp_path / "a.json", file_format="text")) == 1
