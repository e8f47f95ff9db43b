"""The tokenizer that transformers loads gives the ids that training read."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pipelines.errors import UserError
from pipelines.hf_tokenizer import (
    byte_tokenizer_json,
    refuse_another_vocabulary,
    training_tokenizer_json,
    write_tokenizer,
)
from pipelines.tokenizer import BYTE_DOCUMENT_TOKEN, ByteTokenizer, HuggingFaceTokenizer, load_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")

BYTES = byte_tokenizer_json(BYTE_DOCUMENT_TOKEN, 256)
TEXTS = ["", " ", "  a\tb\r\n", "import os\n", "é🙂👩‍👩‍👧 \x00\x7f\ufeff", "日本語 ß", "".join(map(chr, range(0x250)))]


@pytest.fixture(scope="module")
def trained_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE whose own template puts a token before every text, and which truncates and pads."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["the cat and the other cat, then the hat"] * 9, trainer)
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.enable_truncation(4)
    library.enable_padding(length=9)
    path = tmp_path_factory.mktemp("tokenizer") / "mine.json"
    library.save(str(path))
    return path


def loaded(folder: Path, content: str, document_token: str) -> Any:
    transformers = pytest.importorskip("transformers")
    write_tokenizer(folder, content, document_token, 64)
    return transformers.AutoTokenizer.from_pretrained(folder)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_every_text_has_the_same_ids_as_its_bytes_and_comes_back(text: str) -> None:
    library = Tokenizer.from_str(BYTES)
    library.encode_special_tokens = True
    ids = library.encode(text).ids
    assert ids == list(text.encode())
    assert library.decode(ids) == text


def test_all_bytes_and_the_document_token_have_their_ids() -> None:
    assert Tokenizer.from_str(BYTES).get_vocab_size() == 257
    ids = list("é🙂".encode())
    assert Tokenizer.from_str(BYTES).decode([*ids, 256, 65], skip_special_tokens=False) == "é🙂<|document|>A"


def test_transformers_loads_the_byte_tokenizer_with_its_document_token(tmp_path: Path) -> None:
    theirs = loaded(tmp_path, BYTES, BYTE_DOCUMENT_TOKEN)
    ours = ByteTokenizer()
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == 256
    for text in TEXTS:
        encoded = theirs(text)
        assert set(encoded) == {"input_ids", "attention_mask"}
        assert encoded["input_ids"] == ours.encode(text.encode()).tolist()
        assert theirs.decode(encoded["input_ids"]) == text
    named = "a<|document|>b"
    assert theirs(named)["input_ids"] == [97, 256, 98]
    literally = theirs(named, split_special_tokens=True)["input_ids"]
    assert literally == ours.encode(named.encode()).tolist()


def test_our_own_reader_takes_the_written_byte_tokenizer_for_the_byte_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, BYTES, BYTE_DOCUMENT_TOKEN, 64)
    read = HuggingFaceTokenizer(tmp_path / "tokenizer.json", None)
    assert (read.vocab_size, read.document_id, read.document_token) == (257, 256, BYTE_DOCUMENT_TOKEN)
    for text in [*TEXTS, "a<|document|>b"]:
        assert read.encode(text.encode()).tolist() == list(text.encode())


def test_a_file_is_written_without_the_template_that_training_does_not_apply(
    trained_file: Path, tmp_path: Path
) -> None:
    ours = load_tokenizer(str(trained_file), None)
    theirs = loaded(tmp_path, training_tokenizer_json(ours), ours.document_token)
    raw = Tokenizer.from_file(str(trained_file)).encode("the cat and the hat").ids
    assert raw[0] == 0, "the template is there"
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text.encode()).tolist()
        assert theirs.decode(ids) == text
    assert theirs.eos_token == "<|endoftext|>"


def test_equal_vocabularies_pass_and_others_are_refused_by_the_first_token(trained_file: Path, tmp_path: Path) -> None:
    assert not refuse_another_vocabulary(tmp_path, BYTES, "byte")
    write_tokenizer(tmp_path, BYTES, BYTE_DOCUMENT_TOKEN, 64)
    assert refuse_another_vocabulary(tmp_path, BYTES, "byte")
    file = trained_file.read_text()
    with pytest.raises(UserError, match=r"is not the tokenizer of the text \(mine\.json\): token '.*' is"):
        refuse_another_vocabulary(tmp_path, file, "mine.json")
    content = json.loads(BYTES)
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    with pytest.raises(UserError, match=r"token 'A' is id 65 there and id 66 here"):
        refuse_another_vocabulary(tmp_path, json.dumps(content), "swapped")


def test_a_tokenizer_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a Hugging Face tokenizers JSON file"):
        refuse_another_vocabulary(tmp_path, BYTES, "byte")
