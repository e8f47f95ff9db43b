"""The command ``steadymoe prepare``: a folder of token shards of the user's choice, with a tokenizer of its own.

``python -m pipelines.prepared INPUT... --out DIR`` takes the same arguments, for ``ray job submit``.
"""

import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines import commands
from pipelines.arguments import PrepareArguments
from pipelines.bpe import DOCUMENT_TOKEN, train_tokenizer, write_transformers_config
from pipelines.byte_progress import ByteProgress
from pipelines.command_line import EXIT_DONE, EXIT_INTERRUPTED, run_command
from pipelines.corpus import Corpus, open_corpus
from pipelines.corpus_writer import TOKENIZER_FILE, write_corpus
from pipelines.errors import UserError
from pipelines.paths import absolute, made_folder
from pipelines.scratch import scratch_folder, sweep
from pipelines.shards import FORMAT, MANIFEST, Manifest, open_shards
from pipelines.tasks import runner
from pipelines.tokenizer import BYTE, fingerprint, load_tokenizer


def run(arguments: PrepareArguments) -> int:
    """Prepare a folder; returns the exit code.

    Raises:
        UserError: input, tokenizer or folder do not allow it; nothing is left in the folder.
    """
    console = Console()
    started = time.monotonic()
    out = Path(absolute(arguments.out))
    corpus = open_corpus(arguments.source())
    tokenizer = arguments.tokenizer or BYTE
    _check_tokenizer(tokenizer, arguments.document_token)
    request = _request(arguments, corpus, tokenizer)
    if (known := _known(out, request)) is not None:
        console.print(f"{escape(str(out))} holds this very preparation already.", highlight=False, soft_wrap=True)
        _report(out, known, console)
        return EXIT_DONE
    try:
        with _new_folder(out) as folder:
            manifest, binary_files = _fill(folder, arguments, corpus, tokenizer, request, console)
            _publish(folder, out)
    except KeyboardInterrupt:
        console.print("Interrupted; nothing was written.", highlight=False)
        return EXIT_INTERRUPTED
    if binary_files:
        console.print(f"{binary_files:,} files found in folders or by patterns hold no text and were left out.")
    took = f"{corpus.size_bytes / 1e6:,.1f} MB of files in {time.monotonic() - started:,.1f} s"
    console.print(f"Prepared {took}: {escape(str(out))}", highlight=False, soft_wrap=True)
    _report(out, manifest, console)
    return EXIT_DONE


def _check_tokenizer(tokenizer: str, document_token: str | None) -> None:
    """A mistake in it is answered before anything is made."""
    try:
        load_tokenizer(tokenizer, document_token)
    except UserError as error:
        said = str(error).replace("data.tokenizer", "--tokenizer").replace("data.document_token", "--document-token")
        raise UserError(said) from None


def _request(arguments: PrepareArguments, corpus: Corpus, tokenizer: str) -> str:
    """Digest (hex) over the state of the source files and all that decides what is made of them."""
    if arguments.train_tokenizer is not None:
        made_by = f"byte-level BPE of {arguments.train_tokenizer}"
    else:
        made_by = fingerprint(tokenizer, arguments.document_token)
    return hashlib.sha256("\0".join([str(FORMAT), corpus.listing_digest(), made_by]).encode()).hexdigest()


def _known(out: Path, request: str) -> Manifest | None:
    """The manifest of the same preparation if ``out`` holds it, None if there is nothing yet.

    Raises:
        UserError: there is anything else.
    """
    if not out.exists() or (out.is_dir() and not _content(out)):
        return None
    if not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder that is empty or not there yet")
    if (out / MANIFEST).exists():
        manifest = open_shards(out).manifest
        if manifest.preparation == request:
            return manifest
        raise UserError(f"--out {out} holds another prepared corpus; give another folder, or delete this one first")
    if sweep(out):
        raise UserError(f"--out {out} is being prepared by another process")
    if _content(out):
        raise UserError(f"--out {out} is not empty; give a folder that is empty or not there yet")
    return None


def _content(out: Path) -> list[str]:
    # A folder without permission to look into it is no place to write to either.
    try:
        return os.listdir(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be read ({error.strerror})") from error


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """An empty folder within ``out``; ``out`` is gone afterwards if it is new and was left empty."""
    try:
        with made_folder(out), scratch_folder(out) as folder:
            yield folder
    except OSError as error:
        if error.errno is None:  # Ray's own, of a cluster that cannot be reached
            raise
        at = error.filename if isinstance(error.filename, str) else out
        raise UserError(f"--out {out}: cannot be written ({error.strerror}: {at})") from error


def _fill(
    folder: Path, arguments: PrepareArguments, corpus: Corpus, tokenizer: str, request: str, console: Console
) -> tuple[Manifest, int]:
    """Train a tokenizer if one is asked for, and write the shards."""
    document_token = arguments.document_token
    with ByteProgress(console, corpus.size_bytes) as shown:
        shown.phase("starting", measured=False)
        with runner(corpus.text_bytes_estimate, arguments.tasks) as run_pieces:
            if arguments.train_tokenizer is not None:
                shown.phase("reading for the tokenizer")
                tokenizer, document_token = str(folder.parent / TOKENIZER_FILE), DOCUMENT_TOKEN
                train_tokenizer(
                    corpus,
                    arguments.train_tokenizer,
                    Path(tokenizer),
                    run_pieces,
                    progress=shown.update,
                    merging=lambda: shown.phase("merging pairs of tokens", measured=False),
                )
                write_transformers_config(folder)
            shown.phase("preparing text")
            return write_corpus(
                folder,
                arguments.source(),
                corpus,
                tokenizer,
                document_token,
                run_pieces,
                preparation=request,
                progress=shown.update,
            )


def _publish(folder: Path, out: Path) -> None:
    """Move all files up, the manifest last: what has no manifest is no corpus.

    Within ``out``, because that may be the root of a volume, which no rename can replace.
    """
    files = sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST)
    moved: list[Path] = []
    try:
        for file in files:
            moved.append(out / file.name)
            os.rename(file, moved[-1])
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise


def _report(out: Path, manifest: Manifest, console: Console) -> None:
    tokenizer = manifest.tokenizer
    console.print(f"tokenizer: {escape(tokenizer.name)}, {tokenizer.vocab_size:,} tokens", highlight=False)
    table = Table("", "documents", "tokens", "bytes of text")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        table.add_row(name, f"{split.documents:,}", f"{split.tokens:,}", f"{split.text_bytes:,}")
    console.print(table)
    # A JSON string is a YAML string; most paths need no quotes.
    path = str(out) if re.fullmatch(r"[\w./-]+", str(out)) else json.dumps(str(out), ensure_ascii=False)
    setting = f"data.corpus={{kind: prepared, path: {path}}}"
    console.print("Train on it with:", highlight=False)
    # Not wrapped: it is there to be copied.
    console.print(f"steadymoe train tiny --set {shlex.quote(setting)}", highlight=False, soft_wrap=True, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command without the rest of the command line."""
    return run_command(PrepareArguments, commands.prepare, argv, "python -m pipelines.prepared")


if __name__ == "__main__":
    sys.exit(main())
