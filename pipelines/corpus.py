"""Documents of a corpus: which files belong to it, in which order, and which of them are held out for validation."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from pipelines.config import CorpusConfig, FilesCorpusConfig, StdlibCorpusConfig
from pipelines.errors import UserError

VALIDATION_FRACTION = 0.05
"""About this share of the documents is held out."""

_NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})

# git's rule for telling binary files from text: a NUL among the first 8000 bytes.
_SNIFFED_BYTES = 8000


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that may be a document; its content has not been looked at yet."""

    name: str
    """POSIX path within the corpus, unique in it."""
    path: str
    size: int
    mtime_ns: int
    named: bool = False
    """Whether the user named this very file, rather than a folder or pattern that it was found by."""


@dataclass(frozen=True, slots=True)
class Document:
    """One file's content."""

    name: str
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


@dataclass(frozen=True)
class Corpus:
    """Files in the order of their names."""

    files: list[SourceFile]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, those included that turn out to be no text."""
        return sum(file.size for file in self.files)

    def listing_digest(self) -> str:
        """SHA-256 (hex) over names, paths, sizes and modification times: tells a known corpus without reading it."""
        lines = (f"{file.name}\0{file.path}\0{file.size}\0{file.mtime_ns}\0" for file in self.files)
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def documents(self) -> Iterator[tuple[SourceFile, Document]]:
        """Every document with its file, in order. Files without text (empty, or binary in a folder) are left out."""
        for file in self.files:
            document = read_document(file)
            if document is not None:
                yield file, document


def read_document(file: SourceFile) -> Document | None:
    """The document in ``file``; None if it is empty or binary. UserError if the user named this binary file himself."""
    try:
        content = Path(file.path).read_bytes()
    except OSError as error:
        raise UserError(f"data.corpus: cannot read {file.path}: {error.strerror}") from error
    if b"\0" in content[:_SNIFFED_BYTES]:
        if file.named:
            raise UserError(f"data.corpus.paths: {file.path} is not a text file (it contains NUL bytes)")
        return None
    return Document(file.name, content, hashlib.sha256(content).digest()) if content else None


def open_corpus(config: CorpusConfig) -> Corpus:
    """Lists the files of a corpus. UserError if a path does not exist or there is no file at all."""
    try:
        files = _stdlib_files(config) if isinstance(config, StdlibCorpusConfig) else _chosen_files(config)
    except OSError as error:
        raise UserError(f"data.corpus: cannot read {error.filename}: {error.strerror}") from error
    if not files:
        raise UserError(f"data.corpus: no files found in {_places(config)}")
    return Corpus(sorted(files, key=lambda file: file.name))


def _places(config: CorpusConfig) -> str:
    return sysconfig.get_path("stdlib") if isinstance(config, StdlibCorpusConfig) else ", ".join(config.paths)


def _walk(folder: str, enters: Callable[[str], bool], keeps: Callable[[str], bool]) -> Iterator[os.DirEntry[str]]:
    """Files under ``folder`` whose name is kept; linked folders are not entered, for they may lead in a circle."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if enters(entry.name):
                    yield from _walk(entry.path, enters, keeps)
            elif keeps(entry.name) and entry.is_file():
                yield entry


def _stdlib_files(config: StdlibCorpusConfig) -> list[SourceFile]:
    """The ``.py`` files of the running interpreter's library, without what was installed beside it."""
    root = sysconfig.get_path("stdlib")
    avoided = _NOT_THE_LIBRARY if config.include_tests else _NOT_THE_LIBRARY | _TEST_FOLDERS
    entries = _walk(root, lambda name: name not in avoided, lambda name: name.endswith(".py"))
    return [_source_file(entry.path, root, entry.stat()) for entry in entries]


def _chosen_files(config: FilesCorpusConfig) -> list[SourceFile]:
    """Named files, and what folders and patterns hold without hidden (dotted) files and folders.

    Names are relative to the innermost folder that holds all of them, so that a corpus may be moved as a whole.
    """
    named: dict[str, bool] = {}
    for given in config.paths:
        path = os.path.abspath(os.path.expanduser(given))
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise UserError(f"data.corpus.paths: {given} does not exist")
        for match in matches:
            if os.path.isdir(match):
                for entry in _walk(match, _is_visible, _is_visible):
                    named.setdefault(entry.path, False)
            else:
                named[match] = named.get(match, False) or match == path
    if not named:
        return []
    root = os.path.commonpath([os.path.dirname(path) for path in named])
    return [_source_file(path, root, os.stat(path), by_name) for path, by_name in named.items()]


def _is_visible(name: str) -> bool:
    return not name.startswith(".")


def _source_file(path: str, root: str, stat: os.stat_result, named: bool = False) -> SourceFile:
    # A cut instead of os.path.relpath, which took half of the time of listing the standard library.
    name = path[len(root) :].lstrip(os.sep)
    return SourceFile(name if os.sep == "/" else PurePath(name).as_posix(), path, stat.st_size, stat.st_mtime_ns, named)
