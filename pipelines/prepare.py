"""Corpus and tokenizer -> token shards: made once under STEADYMOE_HOME and found again unread, or prepared already."""

import hashlib
import os
import uuid
from pathlib import Path

from pipelines.config import DataConfig, FilesCorpusConfig, PreparedCorpusConfig, SourceConfig
from pipelines.corpus import Corpus, open_corpus
from pipelines.corpus_writer import SHARD_BYTES, TOKENIZER_FILE, Progress, write_corpus
from pipelines.errors import UserError
from pipelines.home import corpora_dir
from pipelines.paths import absolute
from pipelines.scratch import scratch_folder
from pipelines.shards import FORMAT, MANIFEST, Shards, open_shards
from pipelines.tasks import runner
from pipelines.tokenizer import BYTE, Tokenizer, fingerprint, load_tokenizer


def prepare(data: DataConfig, progress: Progress | None = None, shard_bytes: int = SHARD_BYTES) -> Shards:
    """The token shards of ``data``: opened if they exist, else made first (``progress`` is called only then).

    Raises UserError if the corpus or the tokenizer is wrong, nothing is held out, or prepared files were damaged.
    """
    if isinstance(data.corpus, PreparedCorpusConfig):
        return _open_prepared(data.corpus, data)
    assert data.tokenizer is not None  # the config's rule for text
    try:
        return _prepare_text(data.corpus, data.tokenizer, data.document_token, progress, shard_bytes)
    except UserError as error:
        # What is said of a file does not know that the file comes from this key.
        named = str(error).startswith(("data.tokenizer", "data.document_token"))
        raise (error if named else UserError(f"data.corpus: {error}")) from None


def find_prepared(data: DataConfig) -> Shards:
    """The token shards of ``data`` if they exist; none are made.

    Raises:
        UserError: there are none, the corpus is not there any more, or prepared files were damaged.
    """
    if isinstance(data.corpus, PreparedCorpusConfig):
        return _open_prepared(data.corpus.model_copy(update={"verify": False}), data)
    assert data.tokenizer is not None  # the config's rule for text
    corpus = open_corpus(data.corpus)
    shards = _known(_pointer(corpus, fingerprint(data.tokenizer, data.document_token)))
    if shards is None:
        raise UserError(
            f"data.corpus: {corpora_dir()} has no token shards of this text; it has changed since, or they were deleted"
        )
    return shards


def absolute_paths(data: DataConfig) -> DataConfig:
    """The same text whatever the working directory is: for a run that may be resumed elsewhere."""
    corpus = data.corpus
    if isinstance(corpus, FilesCorpusConfig):
        corpus = corpus.model_copy(update={"paths": [absolute(path) for path in corpus.paths]})
    elif isinstance(corpus, PreparedCorpusConfig):
        corpus = corpus.model_copy(update={"path": absolute(corpus.path)})
    tokenizer = data.tokenizer if data.tokenizer in (None, BYTE) else absolute(data.tokenizer)
    return data.model_copy(update={"corpus": corpus, "tokenizer": tokenizer})


def tokenizer_of(data: DataConfig) -> Tokenizer:
    """The tokenizer of a run's text: ``data.tokenizer``, or that of the prepared corpus.

    Raises:
        UserError: its file, or the prepared corpus, is not there any more or was altered.
    """
    if not isinstance(data.corpus, PreparedCorpusConfig):
        assert data.tokenizer is not None  # the config's rule for text
        return load_tokenizer(data.tokenizer, data.document_token)
    shards = _open_prepared(data.corpus.model_copy(update={"verify": False}), data)
    made_with = shards.manifest.tokenizer
    if made_with.name == BYTE:
        return load_tokenizer(BYTE, None)
    return load_tokenizer(str(shards.folder / TOKENIZER_FILE), made_with.document_token)


def _open_prepared(corpus: PreparedCorpusConfig, data: DataConfig) -> Shards:
    folder = Path(absolute(corpus.path))
    if not (folder / MANIFEST).is_file():
        where = (
            "" if corpus.path == str(folder) else f" (a relative path starts at the working directory, {Path.cwd()})"
        )
        raise UserError(
            f"data.corpus.path: {folder} holds no prepared corpus, for there is no {MANIFEST} in it{where}; "
            "make one with steadymoe prepare"
        )
    shards = open_shards(folder, verify=corpus.verify)
    made_with = shards.manifest.tokenizer
    if data.tokenizer is not None:
        path = Path(data.tokenizer).expanduser()
        wanted = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and data.tokenizer != BYTE else None
        same = made_with.name == BYTE if data.tokenizer == BYTE else wanted is not None and wanted == made_with.sha256
        if not same:
            raise UserError(
                f"data.tokenizer ({data.tokenizer}) is not the one that {folder} was prepared with ({made_with.name}); "
                "leave it out"
            )
    if data.document_token not in (None, made_with.document_token):
        raise UserError(
            f"data.document_token ({data.document_token}) is not the one that {folder} was prepared with "
            f"({made_with.document_token}); leave it out"
        )
    return shards


def _prepare_text(
    config: SourceConfig, tokenizer: str, document_token: str | None, progress: Progress | None, shard_bytes: int
) -> Shards:
    """Shards under STEADYMOE_HOME.

    A folder is named by the digest of the documents and the tokenizer's fingerprint, and appears complete by a rename,
    so any number of processes may prepare at once. ``listings/`` maps the state of the source files (paths, sizes,
    modification times) to that name: a known corpus costs a directory walk, not a read.
    """
    corpus = open_corpus(config)
    tokenizer_fingerprint = fingerprint(tokenizer, document_token)
    pointer = _pointer(corpus, tokenizer_fingerprint)
    if (known := _known(pointer)) is not None:
        return known
    corpora_dir().mkdir(parents=True, exist_ok=True)
    if progress is not None:
        progress(0, corpus.size_bytes)
    with scratch_folder(corpora_dir()) as scratch, runner(corpus.text_bytes_estimate) as run:
        manifest, _ = write_corpus(
            scratch, config, corpus, tokenizer, document_token, run, shard_bytes=shard_bytes, progress=progress
        )
        folder = corpora_dir() / _key(manifest.corpus_digest, tokenizer_fingerprint)
        _publish(scratch, folder)
    _write_pointer(pointer, folder.name)
    return open_shards(folder)


def _pointer(corpus: Corpus, tokenizer_fingerprint: str) -> Path:
    return corpora_dir() / "listings" / _key(corpus.listing_digest(), tokenizer_fingerprint)


def _known(pointer: Path) -> Shards | None:
    """The shards that a listing's entry leads to, if they exist."""
    if not pointer.exists():
        return None
    folder = corpora_dir() / pointer.read_text()
    return open_shards(folder) if folder.exists() else None


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join([str(FORMAT), *parts]).encode()).hexdigest()[:20]


def _publish(scratch: Path, folder: Path) -> None:
    try:
        os.rename(scratch, folder)
    except OSError:
        # A folder of this name holds the same documents and tokens: another process was faster, or the source files
        # changed in nothing but their times.
        if not (folder / MANIFEST).exists():
            raise


def _write_pointer(pointer: Path, name: str) -> None:
    pointer.parent.mkdir(exist_ok=True)
    scratch = pointer.with_name(f".{pointer.name}-{uuid.uuid4().hex}")
    scratch.write_text(name)
    os.replace(scratch, pointer)
