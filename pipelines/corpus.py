"""Files of a corpus: which belong to it, in which order, and what each is taken for."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from pipelines.config import FileFormat, FilesCorpusConfig, SourceConfig, StdlibCorpusConfig
from pipelines.errors import InputError, UserError
from pipelines.paths import absolute
from pipelines.unpacking import content_suffix, is_compressed, open_unpacked

Kind = Literal["text", "jsonl", "parquet"]

_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
# Of a .json file, to tell a record in each line (as C4 and Dolma have them) from one document over many lines.
_PEEKED_BYTES = 2**16
# Text is about so many times larger than its compressed file or its Parquet file.
_EXPANSION = 4

_NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the corpus; its documents have not been looked at yet."""

    name: str
    """POSIX path within the corpus, unique in it."""
    path: str
    size: int
    mtime_ns: int
    named: bool = False
    """Whether the user named this very file, rather than a folder or pattern that it was found by."""
    kind: Kind = "text"


@dataclass(frozen=True, slots=True)
class Reading:
    """How documents are found in the files."""

    field: str = "text"
    """Field of a JSON line, column of a Parquet file."""
    separator: bytes | None = None
    """Divides text files into documents."""
    divided: bool = True
    """Whether large text files are divided at line ends, if there is no separator."""


@dataclass(frozen=True)
class Corpus:
    """Files in the order of their names."""

    files: list[SourceFile]
    reading: Reading
    places: str
    """Where the files were looked for, for messages."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, those included that turn out to be no text."""
        return sum(file.size for file in self.files)

    @property
    def text_bytes_estimate(self) -> int:
        """About the bytes of text in all files."""
        packed = sum(file.size for file in self.files if file.kind == "parquet" or is_compressed(file.path))
        return self.size_bytes + (_EXPANSION - 1) * packed

    def listing_digest(self) -> str:
        """SHA-256 (hex) over names, paths, sizes, times and the way of reading: tells a known corpus unread."""
        lines = [f"{file.name}\0{file.path}\0{file.size}\0{file.mtime_ns}\0{file.kind}\0" for file in self.files]
        lines.append(repr(self.reading))
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def check_unchanged(self) -> None:
        """UserError if a file has another size or time than when it was listed, or is gone."""
        for file in self.files:
            try:
                stat = os.stat(file.path)
            except OSError:
                stat = None
            if stat is None or (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
                raise UserError(f"{file.path} changed while the corpus was prepared; prepare it again")


def open_corpus(config: SourceConfig) -> Corpus:
    """Lists the files of a corpus. UserError if a path does not exist or there is no file at all."""
    try:
        if isinstance(config, StdlibCorpusConfig):
            places, files, reading = sysconfig.get_path("stdlib"), _stdlib_files(config), Reading(divided=False)
        else:
            separator = None if config.separator is None else config.separator.encode()
            places, files = ", ".join(config.paths), _chosen_files(config)
            reading = Reading(config.field, separator)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    if not files:
        raise UserError(f"{places}: no files found there")
    return Corpus(sorted(files, key=lambda file: file.name), reading, places)


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
        path = absolute(given)
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            what = "no file matches this pattern" if glob.has_magic(given) else "does not exist"
            looked = f" (looked for {path})" if path != given else ""
            raise UserError(f"{given}: {what}{looked}")
        for match in matches:
            if os.path.isdir(match):
                for entry in _walk(match, _is_visible, _is_visible):
                    named.setdefault(entry.path, False)
            else:
                named[match] = named.get(match, False) or match == path
    if not named:
        return []
    root = os.path.commonpath([os.path.dirname(path) for path in named])
    return [
        _source_file(path, root, os.stat(path), by_name, _kind(path, config.format, by_name))
        for path, by_name in named.items()
    ]


def _is_visible(name: str) -> bool:
    return not name.startswith(".")


def _source_file(path: str, root: str, stat: os.stat_result, named: bool = False, kind: Kind = "text") -> SourceFile:
    # A cut instead of os.path.relpath, which took half of the time of listing the standard library.
    name = path[len(root) :].lstrip(os.sep)
    name = name if os.sep == "/" else PurePath(name).as_posix()
    return SourceFile(name, path, stat.st_size, stat.st_mtime_ns, named, kind)


def _kind(path: str, chosen: FileFormat, named: bool) -> Kind:
    """What a file is taken for: what was chosen, or what its name says."""
    if chosen != "auto":
        return chosen
    suffix = content_suffix(path)
    if suffix != ".json":
        return _KINDS.get(suffix, "text")
    if _begins_with_a_record(path):
        return "jsonl"
    if named:
        raise InputError(
            path,
            "is JSON, but not a record in each line; make it JSON lines, or give the format text to read it so",
        )
    return "text"


def _begins_with_a_record(path: str) -> bool:
    """Whether the first line that is not blank is a whole JSON object, or as much of one as was looked at."""
    with open_unpacked(path) as file:
        lines = file.read(_PEEKED_BYTES).lstrip().split(b"\n", 1)
    return lines[0].startswith(b"{") and (lines[0].rstrip().endswith(b"}") or len(lines[0]) > _PEEKED_BYTES // 2)
