from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import UserError
from pipelines.prepare import prepare
from pipelines.shards import MANIFEST, Shards, open_shards
from tests.pipelines.plain_corpus import PlainCorpus, write_corpus


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))


@pytest.fixture
def plain(tmp_path: Path) -> PlainCorpus:
    return write_corpus(tmp_path / "texts")


@pytest.fixture
def shards(plain: PlainCorpus) -> Shards:
    """Files of 50 tokens, so that documents and reads run across them."""
    return prepare(plain.config(), shard_bytes=100)


def test_streams_hold_every_document_followed_by_its_token(plain: PlainCorpus, shards: Shards) -> None:
    for stream, expected in ((shards.train, plain.train()), (shards.validation, plain.validation())):
        assert len(stream.manifest.shards) > 5
        assert stream.read(0, len(stream)).tolist() == [token for _, token in expected]


def test_reads_across_shard_files_equal_a_slice(plain: PlainCorpus, shards: Shards) -> None:
    expected = [token for _, token in plain.train()]
    for start, stop in [(0, 1), (49, 51), (0, 50), (50, 100), (37, 388), (len(expected) - 1, len(expected))]:
        assert shards.train.read(start, stop).tolist() == expected[start:stop]
    for start, stop in [(-1, 5), (5, 5), (0, len(expected) + 1)]:
        with pytest.raises(IndexError):
            shards.train.read(start, stop)


def test_shard_files_are_plain_little_endian_token_ids_of_equal_size(plain: PlainCorpus, shards: Shards) -> None:
    files = [np.fromfile(shards.folder / record.name, "<u2") for record in shards.manifest.train.shards]
    assert {len(file) for file in files[:-1]} == {50}
    assert np.concatenate(files).tolist() == [token for _, token in plain.train()]


def test_documents_of_a_stretch_are_those_of_its_tokens(plain: PlainCorpus, shards: Shards) -> None:
    owners = [name for name, _ in plain.train()]
    first = {name: owners.index(name) for name in set(owners)}
    rng = np.random.default_rng(0)
    cases = [(0, len(owners)), *(sorted(rng.choice(len(owners) + 1, 2, replace=False).tolist()) for _ in range(50))]
    for start, stop in cases:
        names = list(dict.fromkeys(owners[start:stop]))
        spans = shards.train.documents(start, stop)
        assert [span.name for span in spans] == names
        held: dict[str, list[int]] = {}
        for at in range(start, stop):
            held.setdefault(owners[at], []).append(at - first[owners[at]])
        assert [(span.start, span.end) for span in spans] == [(place[0], place[-1] + 1) for place in held.values()]


def test_bytes_of_held_out_text_are_counted_for_every_stretch(plain: PlainCorpus, shards: Shards) -> None:
    is_text = np.array([token != 256 for _, token in plain.validation()])
    for start, stop in [(0, len(is_text)), (0, 1), (3, 300), (11, 211)]:
        assert shards.validation.text_bytes(start, stop) == is_text[start:stop].sum()
    with pytest.raises(ValueError, match="train"):
        shards.train.text_bytes(0, 10)


def test_manifest_counts_what_is_there(plain: PlainCorpus, shards: Shards) -> None:
    manifest = shards.manifest
    for split, expected in ((manifest.train, plain.train()), (manifest.validation, plain.validation())):
        assert split.tokens == len(expected)
        assert split.documents == len({name for name, _ in expected})
        assert split.text_bytes == sum(token != 256 for _, token in expected)
    assert manifest.train.text_bytes + manifest.validation.text_bytes == sum(map(len, plain.documents.values()))
    assert {path.name for path in shards.folder.iterdir()} == {MANIFEST, *(file.name for file in manifest.files())}


@pytest.fixture
def few_files(plain: PlainCorpus) -> Shards:
    return prepare(plain.config(), shard_bytes=16_000)


def _every_file(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != MANIFEST)


def test_missing_truncated_or_grown_file_is_refused_by_name(few_files: Shards) -> None:
    for path in _every_file(few_files.folder):
        content = path.read_bytes()
        for damaged in (content[:-1], content + b"x", b""):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"{path.name} has {len(damaged)} bytes instead of {len(content)}"):
                open_shards(few_files.folder)
        path.unlink()
        with pytest.raises(UserError, match=rf"{path.name} is missing"):
            open_shards(few_files.folder)
        path.write_bytes(content)
    open_shards(few_files.folder, verify=True)


def test_altered_file_of_the_same_size_is_refused_on_request(few_files: Shards) -> None:
    for path in _every_file(few_files.folder):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        open_shards(few_files.folder)
        with pytest.raises(UserError, match=rf"{path.name} does not have the checksum"):
            open_shards(few_files.folder, verify=True)
        path.write_bytes(content)


def test_folder_without_a_good_manifest_is_refused(few_files: Shards, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json cannot be read .* holds no prepared corpus"):
        open_shards(tmp_path)
    manifest = few_files.folder / MANIFEST
    text = manifest.read_text()
    for damaged, where in [
        (text[: len(text) // 2], "JSON"),
        (text.replace('"format": 1', '"format": 2'), "format"),
        (text.replace('"shard_tokens"', '"shard_size"'), "shard_"),
    ]:
        manifest.write_text(damaged)
        with pytest.raises(UserError, match=rf"manifest\.json is not a manifest of format 1 \(wrong at {where}"):
            open_shards(few_files.folder)
