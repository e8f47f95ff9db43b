"""The tokenizer of a run as files that transformers loads, and whether two tokenizers have one vocabulary."""

import json
from pathlib import Path

from pipelines.errors import UserError
from pipelines.hf_folder import TOKENIZER, TOKENIZER_CONFIG
from pipelines.tokenizer import Tokenizer


def byte_tokenizer_json(document_token: str, document_id: int) -> str:
    """A ``tokenizer.json`` that gives byte b the id b: byte-level BPE with all bytes and no merges.

    ``document_token`` within a text is read as that token, as transformers does with every special token; with
    ``split_special_tokens=True`` it is the bytes that it is written with, as in training.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_characters())}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(document_token, normalized=False, special=True)])
    assert library.token_to_id(document_token) == document_id
    return str(library.to_str(pretty=True))


def _byte_characters() -> list[str]:
    """The character that GPT-2's byte-level alphabet writes each byte with: itself where it is printable."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def training_tokenizer_json(tokenizer: Tokenizer) -> str:
    """The ``tokenizer.json`` that gives the ids which training read.

    Templates, truncation and padding of a user's file are left out: training does not apply them.
    """
    if tokenizer.file_content is None:
        return byte_tokenizer_json(tokenizer.document_token, tokenizer.document_id)
    from tokenizers import Tokenizer as Library

    text = tokenizer.file_content.decode("utf-8")
    content = json.loads(text) | {"truncation": None, "padding": None}
    if Library.from_str(text).num_special_tokens_to_add(is_pair=False):
        content["post_processor"] = None
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def write_tokenizer(folder: Path, content: str, document_token: str, length: int) -> None:
    """Write the files that ``AutoTokenizer`` reads. ``length`` is that of the training sequences."""
    (folder / TOKENIZER).write_text(content, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # A document starts after the token that ended the one before it.
        "bos_token": document_token,
        "eos_token": document_token,
        "pad_token": document_token,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
    }
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def refuse_another_vocabulary(folder: Path, content: str, name: str) -> bool:
    """Compare the vocabulary of a folder's ``tokenizer.json`` with ``content``, that of the text; special tokens too.

    Returns:
        False if the folder has no such file, so that nothing could be compared.

    Raises:
        UserError: a token has another id, or is missing on one side; one line naming the first.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        return False
    theirs, ours = _vocabulary(path), _vocabulary_of(content)
    if theirs == ours:
        return True
    unlike = {token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token)}
    token = min(unlike, key=lambda t: (theirs.get(t, ours.get(t)), t))
    raise UserError(
        f"{path} is not the tokenizer of the text ({name}): token {token!r} is {_id(theirs, token)} there and "
        f"{_id(ours, token)} here; set data.tokenizer={path}"
    )


def _id(vocabulary: dict[str, int], token: str) -> str:
    return f"id {vocabulary[token]}" if token in vocabulary else "unknown"


def _vocabulary(path: Path) -> dict[str, int]:
    try:
        return _vocabulary_of(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise UserError(f"{path} is not a Hugging Face tokenizers JSON file ({error})") from error


def _vocabulary_of(content: str) -> dict[str, int]:
    from tokenizers import Tokenizer as Library

    vocabulary: dict[str, int] = Library.from_str(content).get_vocab(with_added_tokens=True)
    return vocabulary
