"""From a document's bytes to token ids and back: raw bytes, or any Hugging Face ``tokenizers`` JSON file."""

import hashlib
import io
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import UserError

BYTE = "byte"
BYTE_DOCUMENT_TOKEN = "<|document|>"

# In this order; the first that the tokenizer knows is taken. DeepSeek writes its bars as U+FF5C and its gaps as U+2581.
USUAL_DOCUMENT_TOKENS = (
    BYTE_DOCUMENT_TOKEN,
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
)


class Tokenizer(ABC):
    """Ids are below ``vocab_size``; ``document_id`` is never the result of encoding a text."""

    name: str
    vocab_size: int
    document_token: str
    """Ends every document."""
    document_id: int
    sha256: str | None
    """Of the tokenizer's file, if there is one."""
    file_content: bytes | None

    @abstractmethod
    def encode_many(self, contents: Sequence[bytes]) -> list[NDArray[np.integer[Any]]]:
        """Token ids of each document, in parallel where the tokenizer can."""

    @abstractmethod
    def encode_measured(self, content: bytes) -> tuple[NDArray[np.integer[Any]], NDArray[np.uint32]]:
        """Token ids, and how many bytes of ``content`` lie behind each: in all, at most ``len(content)``."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """The text of a piece of the stream, document tokens shown by their name."""

    def encode(self, content: bytes) -> NDArray[np.integer[Any]]:
        """Token ids of one document, without a document token."""
        return self.encode_many([content])[0]


class ByteTokenizer(Tokenizer):
    """One token per byte, whatever the bytes are: ids 0 to 255, and 256 for the end of a document."""

    name = BYTE
    vocab_size = 257
    document_token = BYTE_DOCUMENT_TOKEN
    document_id = 256
    sha256 = None
    file_content = None

    def encode_many(self, contents: Sequence[bytes]) -> list[NDArray[np.integer[Any]]]:
        """uint8, without a copy."""
        return [np.frombuffer(content, np.uint8) for content in contents]

    def encode_measured(self, content: bytes) -> tuple[NDArray[np.integer[Any]], NDArray[np.uint32]]:
        """Every token stands for one byte."""
        return self.encode(content), np.ones(len(content), np.uint32)

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Bytes that are no UTF-8 are shown as U+FFFD."""
        stream = np.asarray(ids)
        ends = np.flatnonzero(stream == self.document_id)
        pieces = np.split(stream, ends)
        texts = [piece[piece != self.document_id].astype(np.uint8).tobytes() for piece in pieces]
        return self.document_token.join(text.decode("utf-8", "replace") for text in texts)


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` of Hugging Face's ``tokenizers`` library.

    Its template (begin and end tokens), truncation and padding are not applied: documents are joined here. A special
    token's name within a text is encoded as the ordinary characters that it is, so no text can end its own document.
    """

    def __init__(self, path: Path, document_token: str | None) -> None:
        # Here rather than above: the byte tokenizer does not need it, and it is a native library.
        from tokenizers import Tokenizer as Library

        content = _read(path)
        try:
            self._library = Library.from_buffer(content)
        except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
            raise UserError(f"data.tokenizer: {path} is not a Hugging Face tokenizers JSON file ({error})") from error
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True
        self.name = path.name
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.file_content = content
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps, and an embedding needs the largest
        self.document_token = _find_document_token(vocabulary, document_token, path)
        self.document_id = vocabulary[self.document_token]

    def encode_many(self, contents: Sequence[bytes]) -> list[NDArray[np.integer[Any]]]:
        """uint32, on all cores."""
        texts = [decode_text(content) for content in contents]
        encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def encode_measured(self, content: bytes) -> tuple[NDArray[np.integer[Any]], NDArray[np.uint32]]:
        """A token stands for the bytes (of the text in UTF-8) between the end of the token before it and its own end.

        So what a tokenizer drops, such as a space, counts with the token after it.
        """
        text = decode_text(content)
        encoding = self._library.encode(text, add_special_tokens=False)
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
        bytes_before = np.concatenate(([0], np.cumsum(widths)))
        ends = bytes_before[np.array([end for _, end in encoding.offsets], np.int64)]
        # A text that was no UTF-8 grows when it is written as such.
        ends = np.minimum(ends, len(content))
        return np.array(encoding.ids, np.uint32), np.diff(ends, prepend=0).astype(np.uint32)

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """As the library decodes them."""
        return str(self._library.decode([int(token) for token in ids], skip_special_tokens=False))


def load_tokenizer(tokenizer: str, document_token: str | None) -> Tokenizer:
    """The tokenizer of ``data.tokenizer`` and ``data.document_token``. UserError if they do not fit."""
    if tokenizer != BYTE:
        return HuggingFaceTokenizer(Path(tokenizer).expanduser(), document_token)
    if document_token not in (None, BYTE_DOCUMENT_TOKEN):
        raise UserError(f"data.document_token: the byte tokenizer has its own, {BYTE_DOCUMENT_TOKEN}; leave it null")
    return ByteTokenizer()


def fingerprint(tokenizer: str, document_token: str | None) -> str:
    """SHA-256 (hex) of all that decides the ids, taken without loading the tokenizer."""
    content = b"" if tokenizer == BYTE else _read(Path(tokenizer).expanduser())
    kind = "byte" if tokenizer == BYTE else "huggingface"
    return hashlib.sha256(f"{kind}\0{document_token}\0".encode() + content).hexdigest()


def decode_text(content: bytes) -> str:
    """The text of a file: UTF-8; else the encoding that it declares in its first two lines (PEP 263); else Latin-1."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        pass
    try:
        declared, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(declared)
    except (SyntaxError, LookupError, UnicodeDecodeError):
        return content.decode("latin-1")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"data.tokenizer: cannot read {path} ({error.strerror}); give {BYTE} or the path of a tokenizers JSON file"
        ) from error


def _find_document_token(vocabulary: dict[str, int], chosen: str | None, path: Path) -> str:
    if chosen is not None:
        if chosen not in vocabulary:
            raise UserError(f"data.document_token: {chosen!r} is not in the vocabulary of {path}")
        return chosen
    for token in USUAL_DOCUMENT_TOKENS:
        if token in vocabulary:
            return token
    raise UserError(
        f"data.document_token must be set: {path} has none of the usual ones ({', '.join(USUAL_DOCUMENT_TOKENS)})"
    )
