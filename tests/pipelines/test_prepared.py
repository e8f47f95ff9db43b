"""`steadymoe prepare` as a user meets it, and training on the folder that it makes."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from infra.cli import main
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.loading import dump_config, load_config, parse_setting
from pipelines.prepare import absolute_paths, prepare
from pipelines.shards import MANIFEST, open_shards
from pipelines.tokenizer import load_tokenizer
from tests.pipelines.plain_corpus import DOCUMENT, held_out
from tests.pipelines.small_run import SETTINGS, metrics_of
from tests.pipelines.test_tokenizer import train_bpe

WORDS = ["the", "router", "sends", "every", "token", "to", "two", "of", "its", "experts", "and", "counts", "load"]
NOBODY = 65534


def _texts(number: int = 400, words: int = 60) -> list[str]:
    rng = random.Random(7)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, words))) + f" {n}\n" for n in range(number)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in _texts()))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "prepared" / "corpus"


def _prepare(*arguments: Path | str) -> int:
    return main(["prepare", *map(str, arguments)])


def _refused(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> str:
    """The one line that the command answers a mistake with."""
    assert _prepare(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out
    return captured.err.removeprefix("error: ").rstrip("\n")


def _opened(out: Path, **changes: object) -> DataConfig:
    return DataConfig.model_validate({"corpus": {"kind": "prepared", "path": str(out)}, **changes})


def test_a_folder_of_bytes_holds_both_splits_and_tells_how_to_train_on_it(
    source: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _prepare(source, "--out", out) == 0
    shards = prepare(_opened(out))
    texts = [text.encode() for text in _texts()]
    trained = [token for text in texts if not held_out(text) for token in [*text, DOCUMENT]]
    assert shards.train.read(0, len(shards.train)).tolist() == trained
    assert shards.manifest.validation.documents == sum(map(held_out, texts)) > 0
    assert sorted(path.name for path in out.iterdir()) == sorted([MANIFEST, *(f.name for f in shards.manifest.files())])
    printed = capsys.readouterr().out
    for split in (shards.manifest.train, shards.manifest.validation):
        assert all(f"{number:,}" in printed for number in (split.documents, split.tokens, split.text_bytes))
    words = shlex.split(printed.splitlines()[-1])
    assert words[:4] == ["steadymoe", "train", "tiny", "--set"]
    assert load_config(["tiny"], words[4:]).data == load_config(["tiny"]).data.model_copy(
        update={"corpus": _opened(out).corpus, "tokenizer": None}
    )


def test_the_command_that_is_printed_quotes_any_path(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / 'it\'s a "path": {x}, [bold] # ü'
    assert _prepare(source, "--out", out) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert parse_setting(words[4]) == (("data", "corpus"), {"kind": "prepared", "path": str(out)})


def test_a_trained_tokenizer_goes_with_the_folder(source: Path, out: Path) -> None:
    assert _prepare(source, "--out", out, "--train-tokenizer", "300") == 0
    shards = prepare(_opened(out))
    tokenizer = load_tokenizer(str(out / "tokenizer.json"), None)
    assert shards.manifest.tokenizer.vocab_size == tokenizer.vocab_size == 300
    assert shards.manifest.tokenizer.document_token == "<|endoftext|>"
    ids = shards.train.read(0, len(shards.train))
    expected = [text for text in _texts() if not held_out(text.encode())]
    assert tokenizer.decode(ids).split("<|endoftext|>") == [*expected, ""]
    assert (out / "tokenizer_config.json").exists()


def test_a_tokenizer_of_ones_own_is_copied_into_the_folder(source: Path, out: Path, tmp_path: Path) -> None:
    path = train_bpe(tmp_path / "bpe.json")
    assert _prepare(source, "--out", out, "--tokenizer", path, "--document-token", "def") == 0
    recorded = prepare(_opened(out)).manifest.tokenizer
    assert (recorded.name, recorded.document_token) == ("bpe.json", "def")
    assert (out / "tokenizer.json").read_bytes() == path.read_bytes()


def test_one_large_text_file_is_a_corpus(out: Path, tmp_path: Path) -> None:
    text = "".join(_texts(7000))
    assert len(text) > 2**20
    (tmp_path / "book.txt").write_text(text)
    assert _prepare(tmp_path / "book.txt", "--out", out) == 0
    manifest = prepare(_opened(out)).manifest
    assert manifest.train.documents + manifest.validation.documents > 200
    assert manifest.train.text_bytes + manifest.validation.text_bytes == len(text)


def test_a_separator_may_be_written_with_escapes(out: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(_texts()))
    assert _prepare(tmp_path / "book.txt", "--out", out, "--separator", "\\n\\n") == 0
    manifest = prepare(_opened(out)).manifest
    assert manifest.train.documents + manifest.validation.documents == 400


def test_the_same_preparation_is_found_there_and_another_is_refused(
    source: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _prepare(source, "--out", out) == 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    capsys.readouterr()
    assert _prepare(source, "--out", out) == 0
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


def _waiting_preparation(tmp_path: Path, out: Path) -> "subprocess.Popen[str]":
    """A preparation that reads from a pipe, so that it is at work until it is ended."""
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / f"texts/{number}.txt").write_text(f"text {number}")
    os.mkfifo(tmp_path / "pipe.txt")
    program = "import sys; from infra.cli import main; sys.exit(main())"
    # A named pipe is listed as it is, with 0 bytes, and opening it waits.
    return subprocess.Popen(
        [sys.executable, "-c", program, "prepare", str(tmp_path / "pipe.txt"), "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip


def _wait_for_work(process: "subprocess.Popen[str]", out: Path) -> None:
    deadline = time.monotonic() + 60
    while not list(out.glob(".preparing-*/content/train.names.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_interrupted_preparation_leaves_nothing(source: Path, out: Path, tmp_path: Path) -> None:
    process = _waiting_preparation(tmp_path, out)
    try:
        _wait_for_work(process, out)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.wait()
    assert output.strip().endswith("Interrupted; nothing was written.")
    assert process.returncode == 130
    assert not out.parent.exists()


def test_a_killed_preparation_is_no_corpus_and_the_next_one_sweeps_it_away(
    source: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = _waiting_preparation(tmp_path, out)
    try:
        _wait_for_work(process, out)
        assert f"--out {out} is being prepared by another process" in _refused(capsys, source, "--out", out)
    finally:
        process.kill()
        process.communicate()
    with pytest.raises(UserError, match=r"holds no prepared corpus"):
        prepare(_opened(out))
    assert _prepare(source, "--out", out) == 0
    assert {path.name for path in out.iterdir()} == {MANIFEST, *(f.name for f in open_shards(out).manifest.files())}


def test_the_config_takes_the_folders_tokenizer_and_says_so_again_when_it_is_read_back(out: Path) -> None:
    config = load_config(["micro"], [f"data.corpus={{kind: prepared, path: {out}}}"])
    assert config.data.tokenizer is None
    path = out.with_suffix(".yaml")
    path.parent.mkdir(parents=True)
    path.write_text(dump_config(config))
    assert load_config([str(path)]) == config
    assert load_config(["micro"]).data.tokenizer == "byte"
    with pytest.raises(UserError, match=r"tokenizer: should be byte or the path"):
        load_config(["micro"], ["data.tokenizer=null"])


def test_a_tokenizer_that_is_given_with_a_prepared_corpus_must_be_the_same(
    source: Path, out: Path, tmp_path: Path
) -> None:
    bpe, other = train_bpe(tmp_path / "bpe.json"), train_bpe(tmp_path / "other.json", "</s>")
    assert _prepare(source, "--out", out, "--tokenizer", bpe) == 0
    prepare(_opened(out, tokenizer=str(bpe), document_token="<|endoftext|>"))
    for wrong in ("byte", str(other), str(tmp_path / "absent.json")):
        with pytest.raises(UserError, match=r"data\.tokenizer \(.*\) is not the one that .* was prepared with"):
            prepare(_opened(out, tokenizer=wrong))
    with pytest.raises(UserError, match=r"data\.document_token \(def\) is not the one"):
        prepare(_opened(out, document_token="def"))
    assert _prepare(source, "--out", tmp_path / "bytes") == 0
    prepare(_opened(tmp_path / "bytes", tokenizer="byte"))
    with pytest.raises(UserError, match=r"data\.tokenizer"):
        prepare(_opened(tmp_path / "bytes", tokenizer=str(bpe)))


def test_a_damaged_folder_is_refused_by_the_file(source: Path, out: Path) -> None:
    assert _prepare(source, "--out", out, "--train-tokenizer", "300") == 0
    for name in ("train-00000.bin", "validation.text_bytes.bin", "tokenizer.json"):
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[:-2])
        with pytest.raises(UserError, match=rf"{name} has {len(content) - 2} bytes instead of {len(content)}"):
            prepare(_opened(out))
        (out / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=rf"{name} does not have the checksum"):
            prepare(_opened(out))
        prepare(DataConfig.model_validate({"corpus": {"kind": "prepared", "path": str(out), "verify": False}}))
        (out / name).write_bytes(content)
    (out / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"holds no prepared corpus"):
        prepare(_opened(out))


def test_a_folder_that_is_not_there_is_refused_with_the_place_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        prepare(_opened(Path("some/folder")))
    assert str(caught.value) == (
        f"data.corpus.path: {tmp_path}/some/folder holds no prepared corpus, for there is no manifest.json in it "
        f"(a relative path starts at the working directory, {tmp_path}); make one with steadymoe prepare"
    )


def test_a_run_keeps_paths_that_hold_in_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = absolute_paths(_opened(Path("some/folder")))
    assert (data.corpus.model_dump()["path"], data.tokenizer) == (str(tmp_path / "some/folder"), None)
    files = DataConfig.model_validate({"corpus": {"kind": "files", "paths": ["a", "/b"]}, "tokenizer": "t.json"})
    files = absolute_paths(files)
    assert files.corpus.model_dump()["paths"] == [str(tmp_path / "a"), "/b"]
    assert files.tokenizer == str(tmp_path / "t.json")
    assert absolute_paths(DataConfig()) == DataConfig()


def test_the_files_corpus_of_the_config_reads_the_same(source: Path, out: Path, tmp_path: Path) -> None:
    monkey = pytest.MonkeyPatch()
    monkey.setenv("STEADYMOE_HOME", str(tmp_path / "home"))
    try:
        renamed = tmp_path / "renamed.jsonl"
        renamed.write_text(source.read_text().replace('"text"', '"body"'))
        corpus = {"kind": "files", "paths": [str(renamed)], "field": "body"}
        shards = prepare(DataConfig.model_validate({"corpus": corpus}))
        assert _prepare(renamed, "--field", "body", "--out", out) == 0
        for split in ("train", "validation"):
            ids = [np.fromfile(folder / f"{split}-00000.bin", "<u2").tolist() for folder in (shards.folder, out)]
            assert ids[0] == ids[1]
        corpus["field"] = "absent"
        with pytest.raises(UserError, match=r"data\.corpus: .*renamed\.jsonl, line 1: has no field 'absent'"):
            prepare(DataConfig.model_validate({"corpus": corpus}))
    finally:
        monkey.undo()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    without = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
    return {k: v for k, v in os.environ.items() if k not in without} | {"STEADYMOE_HOME": str(tmp_path / "home")}


@pytest.mark.slow
def test_the_printed_command_trains_on_what_ray_prepared(
    tmp_path: Path, out: Path, environment: dict[str, str]
) -> None:
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in _texts(4000)))
    program = [sys.executable, "-c", "import sys; from infra.cli import main; sys.exit(main())"]

    def run(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [*program, *arguments], env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    printed = run("prepare", str(source), "--out", str(out), "--train-tokenizer", "320", "--tasks", "2")
    words = shlex.split(printed.splitlines()[-1])[1:]
    words[1] = "micro"
    words += [word for setting in SETTINGS if not setting.startswith("data.corpus") for word in ("--set", setting)]
    output = run(*words)
    assert re.search(r"text: 3,\d\d\d documents", output)
    (folder,) = (tmp_path / "home/runs").iterdir()
    losses = {step: metrics["train/loss"] for step, metrics in metrics_of(folder).items()}
    # From the uniform distribution over the folder's own vocabulary, downwards.
    assert losses[1] == pytest.approx(np.log(320), rel=0.05)
    assert losses[12] < losses[1]
    (out / "train-00000.bin").write_bytes(b"")
    refused = run(*words, code=2).strip()
    assert re.fullmatch(r"error: .*train-00000\.bin has 0 bytes instead of \d+; .*", refused)
