"""`steadymoe prepare` as a user meets it."""

import os
import shlex
import shutil
import tempfile
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.loading import load_config, parse_setting
from pipelines.prepare import prepare
from pipelines.shards import MANIFEST, open_shards
from pipelines.tokenizer import load_tokenizer
from tests.pipelines.driver import Driver
from tests.pipelines.mlflow_server import wait_until
from tests.pipelines.plain_corpus import DOCUMENT, held_out
from tests.pipelines.preparing import run_prepare, texts, trained_on, write_lines
from tests.pipelines.test_tokenizer import train_bpe

NOBODY = 65534


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "source.jsonl", texts())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "prepared" / "corpus"


def _refused(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> str:
    """The one line that the command answers a mistake with."""
    assert run_prepare(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out
    return captured.err.removeprefix("error: ").rstrip("\n")


def test_a_folder_of_bytes_holds_both_splits_and_tells_how_to_train_on_it(
    source: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_prepare(source, "--out", out) == 0
    shards = prepare(trained_on(out))
    documents = [text.encode() for text in texts()]
    trained = [token for text in documents if not held_out(text) for token in [*text, DOCUMENT]]
    assert shards.train.read(0, len(shards.train)).tolist() == trained
    assert shards.manifest.validation.documents == sum(map(held_out, documents)) > 0
    assert sorted(path.name for path in out.iterdir()) == sorted([MANIFEST, *(f.name for f in shards.manifest.files())])
    printed = capsys.readouterr().out
    for split in (shards.manifest.train, shards.manifest.validation):
        assert all(f"{number:,}" in printed for number in (split.documents, split.tokens, split.text_bytes))
    words = shlex.split(printed.splitlines()[-1])
    assert words[:4] == ["steadymoe", "train", "tiny", "--set"]
    assert load_config(["tiny"], words[4:]).data == load_config(["tiny"]).data.model_copy(
        update={"corpus": trained_on(out).corpus, "tokenizer": None}
    )


def test_the_command_that_is_printed_quotes_any_path(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / 'it\'s a "path": {x}, [bold] # ü'
    assert run_prepare(source, "--out", out) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert parse_setting(words[4]) == (("data", "corpus"), {"kind": "prepared", "path": str(out)})


def test_a_trained_tokenizer_goes_with_the_folder(source: Path, out: Path) -> None:
    assert run_prepare(source, "--out", out, "--train-tokenizer", "300") == 0
    shards = prepare(trained_on(out))
    tokenizer = load_tokenizer(str(out / "tokenizer.json"), None)
    assert shards.manifest.tokenizer.vocab_size == tokenizer.vocab_size == 300
    assert shards.manifest.tokenizer.document_token == "<|endoftext|>"
    ids = shards.train.read(0, len(shards.train))
    expected = [text for text in texts() if not held_out(text.encode())]
    assert tokenizer.decode(ids).split("<|endoftext|>") == [*expected, ""]
    assert (out / "tokenizer_config.json").exists()


def test_a_tokenizer_of_ones_own_is_copied_into_the_folder(source: Path, out: Path, tmp_path: Path) -> None:
    path = train_bpe(tmp_path / "bpe.json")
    assert run_prepare(source, "--out", out, "--tokenizer", path, "--document-token", "def") == 0
    recorded = prepare(trained_on(out)).manifest.tokenizer
    assert (recorded.name, recorded.document_token) == ("bpe.json", "def")
    assert (out / "tokenizer.json").read_bytes() == path.read_bytes()


def test_one_large_text_file_is_a_corpus(out: Path, tmp_path: Path) -> None:
    text = "".join(texts(7000))
    assert len(text) > 2**20
    (tmp_path / "book.txt").write_text(text)
    assert run_prepare(tmp_path / "book.txt", "--out", out) == 0
    manifest = prepare(trained_on(out)).manifest
    assert manifest.train.documents + manifest.validation.documents > 200
    assert manifest.train.text_bytes + manifest.validation.text_bytes == len(text)


def test_a_separator_may_be_written_with_escapes(out: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(texts()))
    assert run_prepare(tmp_path / "book.txt", "--out", out, "--separator", "\\n\\n") == 0
    manifest = prepare(trained_on(out)).manifest
    assert manifest.train.documents + manifest.validation.documents == 400


def test_the_same_preparation_is_found_there_and_another_is_refused(
    source: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_prepare(source, "--out", out) == 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    capsys.readouterr()
    assert run_prepare(source, "--out", out) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out} holds this very preparation already.\n")
    assert "steadymoe train tiny --set" in printed
    for other in (["--train-tokenizer", "300"], ["--field", "other"]):
        assert "holds another prepared corpus" in _refused(capsys, source, "--out", out, *other)
    source.write_text(source.read_text() + '{"text": "one more"}\n')
    assert "holds another prepared corpus" in _refused(capsys, source, "--out", out)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before


def test_an_out_folder_with_anything_else_is_refused_and_left_as_it_is(
    source: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out.mkdir(parents=True)
    (out / "file").touch()
    assert f"--out {out} is not empty" in _refused(capsys, source, "--out", out)
    assert f"--out {out / 'file'} is a file" in _refused(capsys, source, "--out", out / "file")
    assert "cannot be written" in _refused(capsys, source, "--out", out / "file" / "below")
    assert [path.name for path in out.iterdir()] == ["file"]


def test_a_folder_that_may_not_be_written_is_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Not under tmp_path, which others may not enter; and root may write anywhere.
    place = Path(tempfile.mkdtemp())
    shutil.copy(source, place / "source.jsonl")
    place.chmod(0o555)
    was_root = os.geteuid() == 0
    try:
        if was_root:
            os.seteuid(NOBODY)
        message = _refused(capsys, place / "source.jsonl", "--out", place / "new")
        assert message == f"--out {place / 'new'}: cannot be written (Permission denied: {place / 'new'})"
        assert "cannot be written" in _refused(capsys, place / "source.jsonl", "--out", place / "new" / "deep")
    finally:
        if was_root:
            os.seteuid(0)
        place.chmod(0o755)
        shutil.rmtree(place)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["absent.txt"], "absent.txt: does not exist"),
        (["absent*.txt"], "absent*.txt: no file matches this pattern"),
        (["nothing"], "nothing: no files found there"),
        (["empty.txt"], "empty.txt: no file there holds any text"),
        (["empties.jsonl"], "empties.jsonl: no file there holds any text"),
        (["one.txt"], "one.txt: none of the 1 documents falls to validation (about one in 20 is held out"),
        (["binary.dat"], "binary.dat: is not a text file (it contains NUL bytes)"),
        (["bad.jsonl"], "bad.jsonl, line 2: is not JSON"),
        (["bad.jsonl", "--train-tokenizer", "300"], "bad.jsonl, line 2: is not JSON"),
        (["bad.jsonl", "--tokenizer", "absent.json"], "--tokenizer: cannot read absent.json"),
        (["good.jsonl", "--tokenizer", "bad.jsonl"], "--tokenizer: bad.jsonl is not a Hugging Face tokenizers"),
        (["good.jsonl", "--train-tokenizer", "256"], "--train-tokenizer 256: should be 257 at least"),
        (["good.jsonl", "--train-tokenizer", "x"], "--train-tokenizer x: should be a valid integer"),
        (["good.jsonl", "--train-tokenizer", "99999"], "--train-tokenizer 99999: the training text of"),
        (["good.jsonl", "--train-tokenizer", "300", "--tokenizer", "x"], "--tokenizer and --train-tokenizer: give one"),
        (["good.jsonl", "--document-token", "x"], "--document-token names a token of --tokenizer"),
        (["good.jsonl", "--separator", ""], "--separator: should not be empty"),
        (["good.jsonl", "--format", "jsonl", "--separator", "x"], "--separator divides text files"),
        (["good.jsonl", "--format", "text", "--field", "x"], "--field names a place in JSON lines"),
        (["good.jsonl", "--format", "csv"], "--format csv: should be 'auto', 'text', 'jsonl' or 'parquet'"),
        (["good.jsonl", "--field", "body"], "good.jsonl, line 1: has no field 'body'; its fields are text"),
        (["good.jsonl", "--format", "parquet"], "good.jsonl: cannot be read as Parquet"),
        (["good.jsonl", "--tasks", "0"], "--tasks 0: should be 1 at least"),
        ([], "the following arguments are required: INPUTS"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empties.jsonl").write_text('{"text": ""}\n\n' * 3)
    text = next(text for text in map(str, range(100)) if not held_out(text.encode()))
    (tmp_path / "one.txt").write_text(text)
    (tmp_path / "binary.dat").write_bytes(b"\0\1")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nbad\n')
    (tmp_path / "good.jsonl").write_text("".join(f'{{"text": "text {number}"}}\n' for number in range(100)))
    before = sorted(tmp_path.iterdir())
    assert line in _refused(capsys, *arguments, "--out", "new/folder")
    assert sorted(tmp_path.iterdir()) == before


def test_out_is_required(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _refused(capsys, source) == "--out is required"


def _waiting_preparation(tmp_path: Path, out: Path) -> Driver:
    """A preparation that reads from a pipe, so that it is at work until it is ended."""
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / f"texts/{number}.txt").write_text(f"text {number}")
    os.mkfifo(tmp_path / "pipe.txt")
    # A named pipe is listed as it is, with 0 bytes, and opening it waits.
    return Driver(tmp_path / "home", "prepare", str(tmp_path / "pipe.txt"), "--out", str(out))


def _wait_for_work(driver: Driver, out: Path) -> None:
    def at_work() -> bool:
        assert driver.process.poll() is None, driver.output()
        return bool(list(out.glob(".preparing-*/content/train.names.json")))

    wait_until(at_work)


def test_an_interrupted_preparation_leaves_nothing(out: Path, tmp_path: Path) -> None:
    with _waiting_preparation(tmp_path, out) as driver:
        _wait_for_work(driver, out)
        driver.interrupt()
        assert driver.wait() == 130, driver.output()
    assert driver.output().strip().endswith("Interrupted; nothing was written.")
    assert not out.parent.exists()


def test_a_killed_preparation_is_no_corpus_and_the_next_one_sweeps_it_away(
    source: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _waiting_preparation(tmp_path, out) as driver:
        _wait_for_work(driver, out)
        assert f"--out {out} is being prepared by another process" in _refused(capsys, source, "--out", out)
    with pytest.raises(UserError, match=r"holds no prepared corpus"):
        prepare(trained_on(out))
    assert run_prepare(source, "--out", out) == 0
    assert {path.name for path in out.iterdir()} == {MANIFEST, *(f.name for f in open_shards(out).manifest.files())}
