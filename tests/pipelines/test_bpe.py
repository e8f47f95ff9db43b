import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from pipelines import bpe, cutting
from pipelines.bpe import DOCUMENT_TOKEN, train_tokenizer, write_transformers_config
from pipelines.config import FilesCorpusConfig
from pipelines.corpus import Corpus, open_corpus
from pipelines.errors import UserError
from pipelines.tasks import in_this_process
from pipelines.tokenizer import load_tokenizer
from tests.pipelines.plain_corpus import held_out


def _corpus(path: Path, texts: list[str]) -> Corpus:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return open_corpus(FilesCorpusConfig(paths=[str(path)]))


def _train(corpus: Corpus, vocab_size: int, path: Path) -> dict[str, int]:
    train_tokenizer(corpus, vocab_size, path, in_this_process)
    vocabulary: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab()
    return vocabulary


def _texts(marker_of_held_out: str, marker_of_training: str) -> Iterator[str]:
    """Texts that begin with one marker or the other, by the split that they fall to with it."""
    for number in range(400):
        for marker, wanted in ((marker_of_held_out, True), (marker_of_training, False)):
            text = f"{marker} {number}"
            if held_out(text.encode()) == wanted:
                yield text


def test_held_out_text_is_never_learnt(tmp_path: Path) -> None:
    texts = list(_texts("zebra", "common"))
    assert sum(text.startswith("zebra") for text in texts) > 5
    vocabulary = _train(_corpus(tmp_path / "a.jsonl", texts), 290, tmp_path / "t.json")
    assert "common" in vocabulary
    assert "zebra" not in vocabulary
    assert not {"ze", "br", "ra", "eb"} & set(vocabulary)
    # The same words in training documents are learnt.
    vocabulary = _train(_corpus(tmp_path / "b.jsonl", list(_texts("common", "zebra"))), 290, tmp_path / "t.json")
    assert "zebra" in vocabulary


def test_the_order_of_documents_and_the_pieces_decide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"some text number {number} of {number % 7} words" for number in range(500)]
    _train(_corpus(tmp_path / "a.jsonl", texts), 320, tmp_path / "one.json")
    monkeypatch.setattr(cutting, "PIECE_BYTES", 500)
    _train(_corpus(tmp_path / "b.jsonl", texts[::-1]), 320, tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_the_vocabulary_holds_every_byte_and_is_of_the_size_asked_for(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "a.jsonl", ["plain words and plain words"] * 30 + [f"plain {n}" for n in range(100)])
    vocabulary = _train(corpus, 270, tmp_path / "t.json")
    assert sorted(vocabulary.values()) == list(range(270))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"), None)
    assert (tokenizer.vocab_size, tokenizer.document_token) == (270, DOCUMENT_TOKEN)
    text = "".join(map(chr, range(1, 0x3000, 7))) + f"🙂\r\n\t {DOCUMENT_TOKEN}"
    ids = tokenizer.encode(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.document_id not in ids


def test_a_vocabulary_that_the_text_does_not_give_is_refused_with_the_one_that_it_gives(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "a.jsonl", [f"text {number}" for number in range(100)])
    with pytest.raises(
        UserError, match=r"--train-tokenizer 5000: .* has only (\d+) tokens to learn .*; ask for \1 or"
    ) as e:
        _train(corpus, 5000, tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()
    possible = int(str(e.value).split("has only ")[1].split()[0])
    assert len(_train(corpus, possible, tmp_path / "t.json")) == possible


def test_of_a_huge_corpus_a_part_is_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[str] = []
    monkeypatch.setattr(bpe, "SAMPLE_BYTES", 3000)
    corpus = _corpus(tmp_path / "a.jsonl", [f"text {number} " + "x" * 80 for number in range(300)])
    original = bpe._texts

    def listen(*arguments: object) -> Iterator[str]:
        for text in original(*arguments):  # type: ignore[arg-type]
            fed.append(text)
            yield text

    monkeypatch.setattr(bpe, "_texts", listen)
    _train(corpus, 260, tmp_path / "t.json")
    assert 1000 < sum(map(len, fed)) < 6000


def test_mistakes_in_the_files_come_through_the_library(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nbad\n')
    with pytest.raises(UserError, match="line 2: is not JSON"):
        _train(open_corpus(FilesCorpusConfig(paths=[str(tmp_path)])), 300, tmp_path / "t.json")


def test_transformers_reads_the_folder(tmp_path: Path) -> None:
    _train(_corpus(tmp_path / "a.jsonl", [f"café {n} 🙂" for n in range(100)]), 270, tmp_path / "tokenizer.json")
    write_transformers_config(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(str(tmp_path / "tokenizer.json"), None)
    assert (len(theirs), theirs.eos_token, theirs.eos_token_id) == (270, DOCUMENT_TOKEN, ours.document_id)
    text = "café 12 🙂\n"
    assert theirs(text)["input_ids"] == ours.encode(text.encode()).tolist()
    assert theirs.decode(theirs(text)["input_ids"]) == text
