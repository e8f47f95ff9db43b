"""Corpus and tokenizer -> token shards under STEADYMOE_HOME, made once and found again without reading the corpus."""

import hashlib
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from pipelines.config import CorpusConfig, DataConfig
from pipelines.corpus import Corpus, Document, SourceFile, open_corpus, read_document
from pipelines.errors import UserError
from pipelines.home import corpora_dir
from pipelines.shard_writer import SplitWriter
from pipelines.shards import FORMAT, MANIFEST, Dtype, Manifest, Shards, TokenizerManifest, open_shards
from pipelines.tokenizer import Tokenizer, fingerprint, load_tokenizer

SHARD_BYTES = 64 * 2**20
_BATCH_BYTES = 2**20  # of text given to the tokenizer at a time: enough for all cores, and for a smooth progress bar

# Called with the bytes of text read so far and in all.
Progress = Callable[[int, int], None]


def prepare(data: DataConfig, progress: Progress | None = None, shard_bytes: int = SHARD_BYTES) -> Shards:
    """The token shards of ``data``: opened if they exist, else made first (``progress`` is called only then).

    A folder is named by the digest of the documents and the tokenizer's fingerprint, and appears complete by a rename,
    so any number of processes may prepare at once. ``listings/`` maps the state of the source files (paths, sizes,
    modification times) to that name: a known corpus costs a directory walk, not a read. ``shard_bytes`` bounds a file.

    Raises UserError if the corpus or the tokenizer is wrong, nothing is held out, or prepared files were damaged.
    """
    corpus = open_corpus(data.corpus)
    tokenizer_fingerprint = fingerprint(data.tokenizer, data.document_token)
    listing = _key(corpus.listing_digest(), tokenizer_fingerprint)
    pointer = corpora_dir() / "listings" / listing
    if pointer.exists():
        folder = corpora_dir() / pointer.read_text()
        if folder.exists():
            return open_shards(folder)
    tokenizer = load_tokenizer(data.tokenizer, data.document_token)
    scratch = corpora_dir() / f".preparing-{uuid.uuid4().hex}"
    scratch.mkdir(parents=True)
    try:
        manifest = _write(data.corpus, corpus, tokenizer, scratch, shard_bytes, progress)
        folder = corpora_dir() / _key(manifest.corpus_digest, tokenizer_fingerprint)
        _publish(scratch, folder)
    finally:
        if scratch.exists():
            shutil.rmtree(scratch)
    _write_pointer(pointer, folder.name)
    return open_shards(folder)


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


def _write(
    config: CorpusConfig,
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    shard_bytes: int,
    progress: Progress | None,
) -> Manifest:
    dtype: Dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    shard_tokens = shard_bytes // (2 if dtype == "uint16" else 4)
    train = SplitWriter(folder, "train", dtype, tokenizer.document_id, shard_tokens, measured=False)
    validation = SplitWriter(folder, "validation", dtype, tokenizer.document_id, shard_tokens, measured=True)
    digest = hashlib.sha256()
    held_out: list[tuple[bytes, SourceFile]] = []
    done = 0
    for batch in _batches(corpus):
        for file, document in batch:
            digest.update(document.name.encode("utf-8", "surrogateescape") + b"\0" + document.digest)
            if document.held_out:
                held_out.append((document.digest, file))
        trained = [document for _, document in batch if not document.held_out]
        for document, ids in zip(trained, tokenizer.encode_many([item.content for item in trained]), strict=True):
            train.add(document.name, ids, len(document.content))
        done += sum(len(document.content) for _, document in batch)
        if progress is not None:
            progress(done, corpus.size_bytes)
    # Validation reads from the start up to a limit. In the order of names that would be one neighbourhood of the
    # corpus; in the order of digests it is a sample of all of it.
    for known, file in sorted(held_out, key=lambda item: (item[0], item[1].name)):
        document = _read_again(file, known)
        ids, per_token = tokenizer.encode_measured(document.content)
        validation.add(document.name, ids, len(document.content), per_token)
    if progress is not None:
        progress(corpus.size_bytes, corpus.size_bytes)
    manifest = Manifest(
        corpus=config,
        corpus_digest=digest.hexdigest(),
        python=platform.python_version(),
        tokenizer=TokenizerManifest(
            name=tokenizer.name,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            document_token=tokenizer.document_token,
            document_id=tokenizer.document_id,
        ),
        dtype=dtype,
        shard_tokens=shard_tokens,
        train=train.close(),
        validation=validation.close(),
    )
    _check_both_splits(manifest)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2))
    return manifest


def _batches(corpus: Corpus) -> Iterator[list[tuple[SourceFile, Document]]]:
    batch: list[tuple[SourceFile, Document]] = []
    size = 0
    for file, document in corpus.documents():
        batch.append((file, document))
        size += len(document.content)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read_again(file: SourceFile, digest: bytes) -> Document:
    document = read_document(file)
    if document is None or document.digest != digest:
        raise UserError(f"data.corpus: {file.path} changed while the corpus was prepared; prepare it again")
    return document


def _check_both_splits(manifest: Manifest) -> None:
    documents = manifest.train.documents + manifest.validation.documents
    if documents == 0:
        raise UserError("data.corpus: no file in it holds any text")
    for split, held in (("training", manifest.train), ("validation", manifest.validation)):
        if held.documents == 0:
            raise UserError(
                f"data.corpus: none of the {documents} documents falls to {split} (a document is a file; about one in "
                "20 is held out, chosen by its content); give more files, or divide large ones"
            )
