import os
import sysconfig
from pathlib import Path

import pytest

from pipelines.config import FilesCorpusConfig, StdlibCorpusConfig
from pipelines.corpus import Corpus, open_corpus
from pipelines.cutting import cut
from pipelines.documents import Document, read_documents
from pipelines.errors import UserError
from tests.pipelines.plain_corpus import held_out


def _files(*paths: Path | str) -> Corpus:
    return open_corpus(FilesCorpusConfig(paths=[str(path) for path in paths]))


def _documents(corpus: Corpus) -> list[tuple[str, Document]]:
    """Names and documents; of files that are a document each."""
    read = ((piece, read_documents(piece, corpus.reading)) for piece in cut(corpus))
    return [
        (piece.name(place, 0), document)
        for piece, found in read
        for place, document in zip(found.places, found.documents, strict=True)
    ]


def _names(corpus: Corpus) -> list[str]:
    return [name for name, _ in _documents(corpus)]


def _fill(folder: Path, **contents: str | bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.txt").write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("include_tests", [True, False])
def test_stdlib_corpus_is_every_source_file_of_the_library_and_nothing_installed(include_tests: bool) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    excluded = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}
    if not include_tests:
        excluded |= {"test", "tests", "idle_test"}
    expected = [
        path.relative_to(root)
        for path in root.rglob("*.py")
        if path.is_file() and not excluded.intersection(path.relative_to(root).parts)
    ]
    corpus = open_corpus(StdlibCorpusConfig(include_tests=include_tests))
    names = [file.name for file in corpus.files]
    assert names == sorted(path.as_posix() for path in expected)
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert corpus.size_bytes == sum((root / path).stat().st_size for path in expected)


def test_stdlib_corpus_without_an_installed_test_suite_is_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json/tool.py").write_text("pass")
    (tmp_path / "notes.txt").write_text("not source")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path)}[name])
    assert _names(open_corpus(StdlibCorpusConfig())) == ["json/tool.py"]


def test_split_is_decided_by_content_alone(tmp_path: Path) -> None:
    _fill(tmp_path / "one", **{f"n{number}": f"text {number}" for number in range(400)})
    _fill(tmp_path / "two", **{f"m{number}": f"text {number}" for number in range(400)})
    documents = _documents(_files(tmp_path))
    assert [document.held_out for _, document in documents] == [held_out(item.content) for _, item in documents]
    one, two = (
        {document.content for name, document in documents if document.held_out and name.startswith(folder)}
        for folder in ("one", "two")
    )
    assert one == two
    assert 8 <= len(one) <= 36  # 20 expected, standard deviation 4.4


def test_split_of_a_document_does_not_change_when_others_are_added(tmp_path: Path) -> None:
    _fill(tmp_path, **{f"n{number}": f"text {number}" for number in range(0, 400, 2)})
    before = {name: document.held_out for name, document in _documents(_files(tmp_path))}
    _fill(tmp_path, **{f"n{number}": f"text {number}" for number in range(400)})
    after = {name: document.held_out for name, document in _documents(_files(tmp_path))}
    assert len(after) == 2 * len(before)
    assert {name: after[name] for name in before} == before


def test_folders_are_searched_for_visible_text_files(tmp_path: Path) -> None:
    _fill(tmp_path / "corpus/sub", a="text", binary=b"a\0b", empty="", latin=b"caf\xe9")
    _fill(tmp_path / "corpus/.git", c="hidden")
    (tmp_path / "corpus/.hidden").write_text("hidden")
    (tmp_path / "corpus/README").write_text("no suffix")
    (tmp_path / "corpus/loop").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus/broken").symlink_to(tmp_path / "nowhere")
    assert _names(_files(tmp_path / "corpus")) == ["README", "sub/a.txt", "sub/latin.txt"]


def test_patterns_files_and_folders_together_name_each_file_once_in_one_order(tmp_path: Path) -> None:
    _fill(tmp_path / "x/deep", a="1", b="2")
    _fill(tmp_path / "y", c="3")
    expected = ["x/deep/a.txt", "x/deep/b.txt", "y/c.txt"]
    assert _names(_files(tmp_path / "y/c.txt", tmp_path / "x/**/*.txt", tmp_path / "x")) == expected
    assert _names(_files(tmp_path / "x", tmp_path / "y")) == expected
    assert _names(_files(tmp_path / "*/*.txt")) == ["c.txt"]


def test_relative_and_home_paths_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(tmp_path, a="text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _names(_files("a.txt")) == _names(_files("~/a.txt")) == _names(_files("*.txt")) == ["a.txt"]


@pytest.mark.parametrize(
    ("path", "problem"), [("absent.txt", "does not exist"), ("absent/*.txt", "no file matches this pattern")]
)
def test_missing_path_is_refused_with_the_place_where_it_was_looked_for(
    tmp_path: Path, path: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as caught:
        _files(tmp_path / path)
    assert str(caught.value) == f"{tmp_path / path}: {problem}"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        _files(path)
    assert str(caught.value) == f"{path}: {problem} (looked for {tmp_path / path})"


def test_binary_file_that_was_named_is_refused(tmp_path: Path) -> None:
    _fill(tmp_path, binary=b"a\0b")
    with pytest.raises(UserError, match=r"binary\.txt: is not a text file"):
        _names(_files(tmp_path / "binary.txt"))
    with pytest.raises(UserError, match="not a text file"):
        _names(_files(tmp_path, tmp_path / "binary.txt"))


def test_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no files found there"):
        _files(tmp_path)


def test_listing_digest_sees_every_change_of_the_files(tmp_path: Path) -> None:
    _fill(tmp_path, a="text", b="more")
    digests = [_files(tmp_path).listing_digest()]
    assert _files(tmp_path).listing_digest() == digests[0]
    (tmp_path / "a.txt").write_text("longer text")
    digests.append(_files(tmp_path).listing_digest())
    os.utime(tmp_path / "a.txt", ns=(0, 1))
    digests.append(_files(tmp_path).listing_digest())
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    digests.append(_files(tmp_path).listing_digest())
    _fill(tmp_path, d="new")
    digests.append(_files(tmp_path).listing_digest())
    assert len(set(digests)) == 5
