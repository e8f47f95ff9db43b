import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pipelines.errors import UserError
from pipelines.tokenizer import Tokenizer as OurTokenizer
from pipelines.tokenizer import decode_text, fingerprint, load_tokenizer

TEXT = "def café(x):\n    return x  # 🙂 naïve\n"


def train_bpe(path: Path, document_token: str = "<|endoftext|>") -> Path:
    """A byte-level BPE that begins and ends every text, cuts it at 5 tokens and pads it to 7, as some files ask for."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[document_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([TEXT, "return return def def def"] * 3, trainer)
    library.post_processor = processors.TemplateProcessing(
        single=f"{document_token} $A {document_token}",
        special_tokens=[(document_token, library.token_to_id(document_token))],
    )
    library.enable_truncation(5)
    library.enable_padding(length=7)
    library.save(str(path))
    return path


@settings(deadline=None)
@given(st.binary())
def test_byte_tokens_are_the_bytes(content: bytes) -> None:
    tokenizer = load_tokenizer("byte", None)
    ids, text_bytes = tokenizer.encode_measured(content)
    assert ids.tolist() == tokenizer.encode(content).tolist() == list(content)
    assert text_bytes.tolist() == [1] * len(content)


def test_byte_tokenizer_shows_its_document_token() -> None:
    tokenizer = load_tokenizer("byte", "<|document|>")
    assert (tokenizer.vocab_size, tokenizer.document_id, tokenizer.document_token) == (257, 256, "<|document|>")
    assert tokenizer.decode([256, *"é".encode(), 256, 256, 65, 0xFF]) == "<|document|>é<|document|><|document|>A\ufffd"


def test_byte_tokenizer_refuses_another_document_token() -> None:
    with pytest.raises(UserError, match=r"data\.document_token"):
        load_tokenizer("byte", "</s>")


def test_bpe_encodes_the_whole_text_and_nothing_else(tmp_path: Path) -> None:
    path = train_bpe(tmp_path / "bpe.json")
    tokenizer = load_tokenizer(str(path), None)
    ids = tokenizer.encode(TEXT.encode())
    assert 7 < len(ids) < len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.document_id not in ids
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert tokenizer.name == "bpe.json"


def test_document_token_written_in_a_text_is_ordinary_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(train_bpe(tmp_path / "bpe.json")), None)
    text = "before <|endoftext|> after"
    ids = tokenizer.encode(text.encode())
    assert tokenizer.document_id not in ids
    assert tokenizer.decode(ids) == text


def test_batch_encoding_equals_one_by_one(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(train_bpe(tmp_path / "bpe.json")), None)
    contents = [TEXT.encode(), b"return", b"\xff\xfe", TEXT[::-1].encode()]
    together = [ids.tolist() for ids in tokenizer.encode_many(contents)]
    assert together == [tokenizer.encode(content).tolist() for content in contents]
    assert together == [tokenizer.encode_measured(content)[0].tolist() for content in contents]


def test_bytes_behind_each_bpe_token_are_those_it_decodes_to(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(train_bpe(tmp_path / "bpe.json")), None)
    library = Tokenizer.from_file(str(tmp_path / "bpe.json"))
    text = "def return naïve café é"
    ids, text_bytes = tokenizer.encode_measured(text.encode())
    # Every symbol of a byte-level token is one byte.
    lengths = [len(str(library.id_to_token(token))) for token in ids.tolist()]
    assert text_bytes.sum() == sum(lengths) == len(text.encode())
    borders, expected = np.cumsum(text_bytes).tolist(), np.cumsum(lengths).tolist()
    for border, exact in zip(borders, expected, strict=True):
        # A token that ends within a character already counts all of it.
        whole_characters = {len(text[:end].encode()) for end in range(len(text) + 1)}
        assert border == min(length for length in whole_characters if length >= exact)


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> OurTokenizer:
    """Strips accents and drops white space: its tokens are not the text."""
    library = Tokenizer(models.WordLevel({"</s>": 0, "[UNK]": 1}, unk_token="[UNK]"))
    library.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("lossy") / "lossy.json"
    library.save(str(path))
    return load_tokenizer(str(path), None)


@settings(deadline=None)
@given(st.one_of(st.text(max_size=40).map(str.encode), st.binary(max_size=40)))
def test_bytes_behind_tokens_never_exceed_the_text(lossy: OurTokenizer, content: bytes) -> None:
    ids, text_bytes = lossy.encode_measured(content)
    assert len(ids) == len(text_bytes)
    assert int(text_bytes.sum()) <= len(content)


def test_dropped_white_space_counts_with_the_token_after_it(lossy: OurTokenizer) -> None:
    ids, text_bytes = lossy.encode_measured("  é  bc \n".encode())
    assert (len(ids), text_bytes.tolist()) == (2, [4, 4])


@pytest.mark.parametrize("token", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"])
def test_usual_document_tokens_are_found(tmp_path: Path, token: str) -> None:
    tokenizer = load_tokenizer(str(train_bpe(tmp_path / "bpe.json", token)), None)
    assert tokenizer.document_token == token
    assert tokenizer.decode([tokenizer.document_id]) == token


def test_unusual_document_token_must_be_named_and_exist(tmp_path: Path) -> None:
    path = str(train_bpe(tmp_path / "bpe.json", "<|stop|>"))
    with pytest.raises(UserError, match=r"data\.document_token must be set: .*bpe\.json"):
        load_tokenizer(path, None)
    with pytest.raises(UserError, match=r"data\.document_token: '<\|halt\|>' is not in the vocabulary"):
        load_tokenizer(path, "<|halt|>")
    assert load_tokenizer(path, "<|stop|>").document_token == "<|stop|>"


def test_vocabulary_size_covers_gaps_between_ids(tmp_path: Path) -> None:
    library = Tokenizer(models.WordLevel({"a": 0, "</s>": 5}, unk_token="a"))
    library.add_tokens([AddedToken("b")])
    library.save(str(tmp_path / "gaps.json"))
    assert load_tokenizer(str(tmp_path / "gaps.json"), None).vocab_size > 5


def test_missing_or_foreign_tokenizer_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer: cannot read .*absent\.json"):
        load_tokenizer(str(tmp_path / "absent.json"), None)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"data\.tokenizer: .*other\.json is not a Hugging Face tokenizers JSON"):
        load_tokenizer(str(tmp_path / "other.json"), None)


def test_fingerprint_follows_the_file_and_the_document_token(tmp_path: Path) -> None:
    path = train_bpe(tmp_path / "bpe.json")
    prints = [fingerprint("byte", None), fingerprint(str(path), None), fingerprint(str(path), "def")]
    copy = tmp_path / "copy.json"
    copy.write_bytes(path.read_bytes())
    assert fingerprint(str(copy), None) == prints[1]
    copy.write_bytes(path.read_bytes() + b"\n")
    prints.append(fingerprint(str(copy), None))
    assert len(set(prints)) == 4


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("naïve 🙂".encode(), "naïve 🙂"),
        ("# -*- coding: koi8-r -*-\n# Помимо".encode("koi8-r"), "# -*- coding: koi8-r -*-\n# Помимо"),
        (b"caf\xe9", "café"),
        (b"# coding: no-such-codec\ncaf\xe9", "# coding: no-such-codec\ncafé"),
        (b"# coding: ascii\ncaf\xe9", "# coding: ascii\ncafé"),
    ],
)
def test_text_that_is_not_utf8_is_read_as_declared_or_latin1(content: bytes, text: str) -> None:
    assert decode_text(content) == text
