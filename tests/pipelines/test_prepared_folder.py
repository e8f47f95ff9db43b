"""Training on a folder that `steadymoe prepare` made: its tokenizer, its damage, and where it is looked for."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.loading import dump_config, load_config
from pipelines.prepare import absolute_paths, prepare
from pipelines.shards import MANIFEST
from tests.pipelines.driver import run_steadymoe
from tests.pipelines.preparing import run_prepare, texts, trained_on, write_lines
from tests.pipelines.small_run import SETTINGS, metrics_of
from tests.pipelines.test_tokenizer import train_bpe


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "source.jsonl", texts())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "prepared" / "corpus"


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
    assert run_prepare(source, "--out", out, "--tokenizer", bpe) == 0
    prepare(trained_on(out, tokenizer=str(bpe), document_token="<|endoftext|>"))
    for wrong in ("byte", str(other), str(tmp_path / "absent.json")):
        with pytest.raises(UserError, match=r"data\.tokenizer \(.*\) is not the one that .* was prepared with"):
            prepare(trained_on(out, tokenizer=wrong))
    with pytest.raises(UserError, match=r"data\.document_token \(def\) is not the one"):
        prepare(trained_on(out, document_token="def"))
    assert run_prepare(source, "--out", tmp_path / "bytes") == 0
    prepare(trained_on(tmp_path / "bytes", tokenizer="byte"))
    with pytest.raises(UserError, match=r"data\.tokenizer"):
        prepare(trained_on(tmp_path / "bytes", tokenizer=str(bpe)))


def test_a_damaged_folder_is_refused_by_the_file(source: Path, out: Path) -> None:
    assert run_prepare(source, "--out", out, "--train-tokenizer", "300") == 0
    for name in ("train-00000.bin", "validation.text_bytes.bin", "tokenizer.json"):
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[:-2])
        with pytest.raises(UserError, match=rf"{name} has {len(content) - 2} bytes instead of {len(content)}"):
            prepare(trained_on(out))
        (out / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=rf"{name} does not have the checksum"):
            prepare(trained_on(out))
        prepare(DataConfig.model_validate({"corpus": {"kind": "prepared", "path": str(out), "verify": False}}))
        (out / name).write_bytes(content)
    (out / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"holds no prepared corpus"):
        prepare(trained_on(out))


def test_a_folder_that_is_not_there_is_refused_with_the_place_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        prepare(trained_on(Path("some/folder")))
    assert str(caught.value) == (
        f"data.corpus.path: {tmp_path}/some/folder holds no prepared corpus, for there is no manifest.json in it "
        f"(a relative path starts at the working directory, {tmp_path}); make one with steadymoe prepare"
    )


def test_a_run_keeps_paths_that_hold_in_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = absolute_paths(trained_on(Path("some/folder")))
    assert (data.corpus.model_dump()["path"], data.tokenizer) == (str(tmp_path / "some/folder"), None)
    files = DataConfig.model_validate({"corpus": {"kind": "files", "paths": ["a", "/b"]}, "tokenizer": "t.json"})
    files = absolute_paths(files)
    assert files.corpus.model_dump()["paths"] == [str(tmp_path / "a"), "/b"]
    assert files.tokenizer == str(tmp_path / "t.json")
    assert absolute_paths(DataConfig()) == DataConfig()


def test_the_files_corpus_of_the_config_reads_the_same(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))
    renamed = write_lines(tmp_path / "renamed.jsonl", texts(), "body")
    corpus = {"kind": "files", "paths": [str(renamed)], "field": "body"}
    shards = prepare(DataConfig.model_validate({"corpus": corpus}))
    assert run_prepare(renamed, "--field", "body", "--out", out) == 0
    for split in ("train", "validation"):
        ids = [np.fromfile(folder / f"{split}-00000.bin", "<u2").tolist() for folder in (shards.folder, out)]
        assert ids[0] == ids[1]
    corpus["field"] = "absent"
    with pytest.raises(UserError, match=r"data\.corpus: .*renamed\.jsonl, line 1: has no field 'absent'"):
        prepare(DataConfig.model_validate({"corpus": corpus}))


@pytest.mark.slow
def test_the_printed_command_trains_on_what_ray_prepared(tmp_path: Path, out: Path) -> None:
    home = tmp_path / "home"
    source = write_lines(tmp_path / "source.jsonl", texts(4000))
    prepared = run_steadymoe(
        home, "prepare", str(source), "--out", str(out), "--train-tokenizer", "320", "--tasks", "2"
    )
    words = shlex.split(prepared.stdout.splitlines()[-1])[1:]
    words[1] = "micro"
    words += [word for setting in SETTINGS if not setting.startswith("data.corpus") for word in ("--set", setting)]
    assert re.search(r"text: 3,\d\d\d documents", run_steadymoe(home, *words).stdout)
    (folder,) = (home / "runs").iterdir()
    losses = {step: metrics["train/loss"] for step, metrics in metrics_of(folder).items()}
    # From the uniform distribution over the folder's own vocabulary, downwards.
    assert losses[1] == pytest.approx(np.log(320), rel=0.05)
    assert losses[12] < losses[1]
    (out / "train-00000.bin").write_bytes(b"")
    refused = run_steadymoe(home, *words, code=2).stderr.strip()
    assert re.fullmatch(r"error: .*train-00000\.bin has 0 bytes instead of \d+; .*", refused)
