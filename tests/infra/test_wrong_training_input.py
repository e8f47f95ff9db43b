"""What a user gets wrong about text, training and weights: one line that names it, exit code 2, nothing written."""

import json
import os
import pickle
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.cli import main
from pipelines.home import HOME_VARIABLE
from pipelines.run_folder import RunFolder, RunInfo
from pipelines.tracking_store import URI_VARIABLE
from tests.pipelines.plain_corpus import write_corpus

PROOF = "code-was-run"


class _Bomb:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (PROOF,)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with wrong files of every kind, and an empty STEADYMOE_HOME beside it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write_corpus(folder / "texts")
    (folder / "folder.yaml").mkdir()
    (folder / "empty").mkdir()
    (folder / "blank").mkdir()
    (folder / "blank" / "a.txt").touch()
    (folder / "lonely.txt").write_text("hello")
    (folder / "binary.bin").write_bytes(b"\0" * 100)
    (folder / "tag.yaml").write_text(f"seed: !!python/object/apply:os.mkdir [{PROOF}]\n")
    (folder / "list.yaml").write_text("- seed\n")
    (folder / "bad.yaml").write_text("seed: [1\n")
    (folder / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (folder / "lines.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (folder / "fields.jsonl").write_text('{"body": "one"}\n')
    (folder / "numbers.jsonl").write_text('{"text": 7}\n')
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    (folder / "broken.gz").write_bytes(b"\x1f\x8b and no more")
    (folder / "broken.json").write_text("{}")
    os.symlink("nowhere", folder / "dangling.txt")
    (folder / "pickled").mkdir()
    (folder / "pickled" / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    (folder / "pickled" / "config.json").write_text('{"model_type": "deepseek_v3"}')
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text('{"model_type": "llama"}')
    return folder


def _complaints(capsys: pytest.CaptureFixture[str], words: list[str]) -> list[str]:
    assert main(words) == 2
    captured = capsys.readouterr()
    # What was found out so far about the text may stand there.
    assert re.fullmatch(r"(text: .*\n)?", captured.out)
    lines = captured.err.splitlines()
    assert all(line.startswith("error: ") for line in lines), captured.err
    return [line.removeprefix("error: ") for line in lines]


def _set(*settings: str) -> list[str]:
    return ["train", "micro", *(word for setting in settings for word in ("--set", setting))]


TEXTS = ("data.corpus.kind=files", "data.corpus.paths=[texts]")

CONFIG: list[tuple[str, str]] = [
    ("optimzer.lr=1", r"optimzer: unknown key; did you mean optimizer\?"),
    ("optimizer.lrr=1", r"optimizer\.lrr: unknown key; did you mean optimizer\.lr\?"),
    ("warmup_steps=3", r"warmup_steps: unknown key; did you mean schedule\.warmup_steps\?"),
    ("stability.balance.max_norm=1", r"stability\.balance\.max_norm: unknown key"),
    (
        "stability.balance={kind: none, bias_update_rate: 1}",
        r"stability\.balance\.bias_update_rate: belongs to kind",
    ),
    ("stability.clip.kind=gobal", r"stability\.clip\.kind: 'gobal' is no kind of clip; did you mean global\?"),
    ("optimizer.kind=adam", r"optimizer\.kind: 'adam' is no kind of optimizer; did you mean adamw\?"),
    ("precision.compute=fp16", r"precision\.compute: should be 'fp32' or 'bf16', got the text 'fp16'"),
    ("precision.fp8.kind=v3", r"precision\.fp8\.kind: 'v3' is no kind of fp8"),
    ("precision.fp8={kind: deepseek_v3, kernel: native}", r"precision\.fp8\.kernel: unknown key"),
    ("parallel.device=gpu", r"parallel\.device: should be 'auto', 'cpu' or 'cuda'"),
    ("optimizer.lr=fast", r"optimizer\.lr: should be a valid number, got the text 'fast'"),
    ("optimizer.lr=nan", r"optimizer\.lr: should be a (valid|finite) number"),
    ("optimizer.lr=.nan", r"optimizer\.lr: should be a finite number, got nan"),
    ("optimizer.lr=-.inf", r"optimizer\.lr: should be a finite number, got -inf"),
    ("optimizer.lr=0", r"optimizer\.lr: should be greater than 0, got 0"),
    ("optimizer.beta2=1", r"optimizer\.beta2: should be less than 1, got 1"),
    ("schedule.steps=0", r"schedule\.steps: should be greater than 0, got 0"),
    ("schedule.steps=1e3", r"schedule\.steps: should be a valid integer, got 1000\.0"),
    ("schedule.steps=true", r"schedule\.steps: should be a valid integer, got true"),
    ("seed=-1", r"seed: should be greater than or equal to 0, got -1"),
    ("model.num_layers=[2]", r"model\.num_layers: should be a valid integer, got "),
    ("model=big", r"model: should be a mapping of keys, got the text 'big'"),
    ("tracking.run_name=7", r"tracking\.run_name: should be text, got 7; quote it"),
    ("tracking.experiment=", r"tracking\.experiment: should be .*text|tracking\.experiment: should be a valid string"),
    ("tracking.uri=http://me:hush@host", r"tracking\.uri: holds a password(?!.*hush)"),
    ("checkpoint.keep=0", r"checkpoint\.keep: should be greater than 0, got 0"),
    ("recovery.max_restarts=-1", r"recovery\.max_restarts: should be greater than or equal to 0"),
    ("schedule.warmup_steps=1000", r"schedule: warmup_steps \(1000\) is larger than steps \(\d+\)"),
    ("parallel={workers: 3, expert_parallel: 2}", r"parallel: workers \(3\) is not divisible by expert_parallel \(2\)"),
    ("model.moe.top_k=9", r"model\.moe: top_k \(9\) is larger than num_experts \(8\)"),
    ("model.moe={num_groups: 4, top_groups: 1, top_k: 3}", r"model\.moe: .*top_k \(3\)|a group is scored"),
    ("model.moe.num_groups=3", r"model\.moe: num_experts \(8\) is not divisible by num_groups \(3\)"),
    ("model.moe.first_dense_layers=2", r"model: moe\.first_dense_layers \(2\) leaves none of the 2 layers"),
    ("model.attention={kind: mha, head_dim: 7}", r"model\.attention\S*: head_dim must be even"),
    (
        "parallel={workers: 3, expert_parallel: 1}",
        r"data\.global_batch_size \(16\) is not divisible by parallel\.workers",
    ),
    (
        "parallel={workers: 16, expert_parallel: 16}",
        r"model\.moe\.num_experts \(8\) is not divisible by",
    ),
    ("data.micro_batch_size=5", r"data\.micro_batch_size \(5\) does not divide a worker's share"),
    ("validation.max_tokens=10", r"validation\.max_tokens \(10\) is less than one sequence for every worker"),
    ("data.corpus.kind=files", r"data\.corpus\.paths: is required here"),
    ("data.corpus={kind: files, paths: []}", r"data\.corpus\.paths: should have at least 1 item, got 0"),
    ("data.corpus={kind: prepared, path: x, format: jsonl}", r"data\.corpus\.format: belongs to kind files"),
    ("schedule.stages=[{steps: 5}]", r"schedule\.stages: belongs to kind stages, but schedule\.kind is simple"),
    ("schedule={kind: stages, stages: [{steps: 5, tokens: 4}]}", r"schedule\.stages\.0: .* either steps or tokens"),
    ("schedule={kind: stages, stages: [{steps: 5, lr: {kind: cosin}}]}", r"schedule\.stages\.0\.lr\.kind: .* cosine\?"),
    (
        "schedule={kind: stages, stages: [{steps: 5, sequence_length: 7}]}",
        r"schedule\.stages\.0\.sequence_length \(7\)",
    ),
    ("stability.clip={kind: zclip, zthreshold: 3}", r"stability\.clip\.zthreshold: .* stability\.clip\.z_threshold\?"),
    ("stability.balance.schedule.warmup_steps=500000", r"stability\.balance\.schedule: .* are more than all steps"),
    ("optimizer={beta2: 0.999, moments: bf16}", r"optimizer: moments=bf16 needs beta2 of at most 0\.9961"),
    ("stability.router_z_loss=0.1", r"stability\.router_z_loss: should be a mapping of keys, got 0\.1"),
    ("stability.clip=zclip", r"stability\.clip: should be a mapping .* did you mean \{kind: zclip\}\?"),
    ("model.norm_placement=post", r"model\.norm_placement: should be 'pre', 'sandwich' or 'reordered'"),
    ("data.corpus={kind: files, paths: [texts], format: text, field: body}", r"data\.corpus: field names a place"),
    ("data.tokenizer=null", r"data: tokenizer: should be byte or the path"),
]

TRAIN: list[tuple[list[str], str]] = [
    (["train", "tinny"], r"unknown preset 'tinny'; did you mean tiny\?"),
    (["train", "tiny.yaml"], r"tiny\.yaml: cannot be read: No such file"),
    (["train", "folder.yaml"], r"folder\.yaml: cannot be read: Is a directory"),
    (["train", "tag.yaml"], r"tag\.yaml, line 1: .*python/object"),
    (["train", "list.yaml"], r"list\.yaml: should hold a mapping of config keys, but holds a list"),
    (["train", "bad.yaml"], r"bad\.yaml, line \d+: not valid YAML"),
    (["train", "twice.yaml"], r"twice\.yaml, line 2: seed is given twice"),
    (["train", "--set"], r".*--set.*expected"),
    (["train", "--set", "optimizer.lr", "1e-3"], r"unknown preset '1e-3'|--set optimizer\.lr: should be key=value"),
    (["train", "--resume"], r".*--resume.*expected"),
    (["train", "--resume", "latest"], r"run latest: there are no runs in .*/home/runs yet"),
    (["train", "micro", "--resume", "latest"], r"--resume takes the config of the run"),
    (["train", "--resume", "x", "--set", "model.num_layers=3"], r"model\.num_layers: cannot change when a run is res"),
    (["train", "--resume", "x", "--init-from", "llama"], r".*--init-from.*--resume|.*--resume.*--init-from"),
    (["train", "micro", "--init-from", "missing"], r".*missing.*"),
    (["train", "micro", "--init-from", "empty"], r".*empty.*config\.json"),
    (["train", "micro", "--init-from", "llama"], r".*llama.*"),
    (["train", "micro", "--init-from", "pickled"], r".*"),
    (_set("data.corpus={kind: files, paths: [missing]}"), r"data\.corpus: .*missing.* does not exist"),
    (_set("data.corpus={kind: files, paths: ['*.nothing']}"), r"data\.corpus: .*\*\.nothing"),
    (_set("data.corpus={kind: files, paths: [dangling.txt]}"), r"data\.corpus: .*dangling\.txt"),
    (_set("data.corpus={kind: files, paths: [empty]}"), r"data\.corpus: empty: no files found there"),
    (_set("data.corpus={kind: files, paths: [blank]}"), r"data\.corpus: blank: no file there holds any text"),
    (_set("data.corpus={kind: files, paths: [binary.bin]}"), r"data\.corpus: .*binary\.bin.*not a text file"),
    (_set("data.corpus={kind: files, paths: [lonely.txt]}"), r"data\.corpus: lonely\.txt: none of the 1 doc"),
    (_set("data.corpus={kind: files, paths: [lines.jsonl]}"), r"data\.corpus: .*lines\.jsonl, line 2: "),
    (_set("data.corpus={kind: files, paths: [fields.jsonl]}"), r"data\.corpus: .*fields\.jsonl, line 1: .*body"),
    (_set("data.corpus={kind: files, paths: [numbers.jsonl]}"), r"data\.corpus: .*numbers\.jsonl, line 1: "),
    (_set("data.corpus={kind: files, paths: [broken.parquet]}"), r"data\.corpus: .*broken\.parquet: "),
    (_set("data.corpus={kind: files, paths: [broken.gz]}"), r"data\.corpus: .*broken\.gz: "),
    (_set("data.corpus={kind: prepared, path: empty}"), r"data\.corpus\.path: .*/empty holds no prepared corpus"),
    (_set(*TEXTS, "data.sequence_length=1000000", "validation.max_tokens=1000000"),
     r"data\.sequence_length \(1000000\)"),
    (_set(*TEXTS, "model.vocab_size=100"), r"model\.vocab_size \(100\) is smaller than the vocabulary .* \(257\)"),
    (_set(*TEXTS, "data.tokenizer=missing.json"), r"data\.tokenizer: cannot read .*missing\.json"),
    (_set(*TEXTS, "data.tokenizer=broken.json"), r"data\.tokenizer: .*broken\.json is not a Hugging Face"),
    (_set(*TEXTS, "data.document_token=END"), r"data\.document_token: the byte tokenizer has its own"),
    (_set("parallel.workers=4096", "data.global_batch_size=4096", "validation.max_tokens=1048576"),
     r"parallel\.workers \(4096\) x parallel\.threads \(1\) needs 4096 CPUs, but this machine has \d+"),
    (["prepare"], r"the following arguments are required: INPUTS"),
    (["prepare", "texts"], r".*--out"),
    (["prepare", "--out", "new"], r"the following arguments are required: INPUTS"),
    (["prepare", "missing", "--out", "new"], r".*missing.* does not exist"),
    (["prepare", "empty", "--out", "new"], r".*/empty: no files found there"),
    (["prepare", "lines.jsonl", "--out", "new"], r".*lines\.jsonl, line 2: "),
    (["prepare", "texts", "--out", "folder.yaml/../blank"], r"--out .*blank.*not empty|--out .*"),
    (["prepare", "texts", "--out", "lonely.txt"], r"--out .*lonely\.txt"),
    (["prepare", "texts", "--out", "/proc/new"], r"--out /proc/new"),
    (["prepare", "texts", "--out", "new", "--train-tokenizer", "200"],
     r"--train-tokenizer 200: should be 257 at least"),
    (["prepare", "texts", "--out", "new", "--train-tokenizer", "many"], r".*train.tokenizer.*integer"),
    (["prepare", "texts", "--out", "new", "--train-tokenizer", "300", "--tokenizer", "x"], r"--tokenizer and --train-"),
    (["prepare", "texts", "--out", "new", "--document-token", "x"], r"--document-token names a token of --tokenizer"),
    (["prepare", "texts", "--out", "new", "--tasks", "0"], r"--tasks 0: should be 1 at least"),
    (["export", "latest", "--to", "new"], r"run latest: there are no runs"),
    (["export", "latest"], r".*--to"),
    (["export", "latest", "--to", "new", "--dtype", "fp8"], r".*dtype.*"),
    (["deliver", "latest"], r"run latest: there are no runs"),
    (["deliver"], r".*required.*RUN|.*run"),
    (["train", "micro", "--set=seed"], r"--set seed: should be key=value"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "line"), [*((_set(s), line) for s, line in CONFIG), *TRAIN])
def test_a_mistake_is_one_line_that_names_it_and_nothing_is_written(
    words: list[str], line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.rglob("*"))
    found = _complaints(capsys, words)
    assert len(found) == 1, found
    assert re.match(line, found[0]), found[0]
    assert "Traceback" not in found[0]
    assert sorted(here.rglob("*")) == before
    # Tokens of a text that is right are kept, for the mistake may be elsewhere.
    assert [path.name for path in (here.parent / "home").glob("*") if path.name != "corpora"] == []


def test_several_mistakes_are_a_line_each(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = _complaints(capsys, _set("seed=-1", "optimzer.lr=1", "schedule.steps=x"))
    assert sorted(line.split(":")[0] for line in lines) == ["optimzer", "schedule.steps", "seed"]


def test_neither_a_yaml_tag_nor_a_pickle_runs_code(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "tag.yaml"], ["train", "micro", "--init-from", "pickled"]):
        _complaints(capsys, words)
    assert not (here / PROOF).exists()
    pickle.loads((here / "pickled" / "pytorch_model.bin").read_bytes())
    assert (here / PROOF).exists(), "the bomb would have gone off"


def _spoil_shard(folder: Path) -> None:
    shard = next(folder.glob("train-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])


def _spoil_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def _lose_shard(folder: Path) -> None:
    next(folder.glob("train-*.bin")).unlink()


@pytest.mark.parametrize("spoil", [_spoil_shard, _spoil_manifest, _lose_shard])
def test_damaged_tokens_are_refused_by_file(
    here: Path, spoil: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "texts", "--out", "tokens"]) == 0
    spoil(here / "tokens")
    capsys.readouterr()
    (line,) = _complaints(capsys, _set("data.corpus={kind: prepared, path: tokens}"))
    assert f"{here}/tokens" in line


def _run(home: Path, name: str, created: str = "2026-01-01T00:00:00+00:00") -> RunFolder:
    folder = RunFolder(home / "runs" / f"id-of-{name}-{created[:4]}")
    uri = f"sqlite:///{home / 'mlflow.db'}"
    folder.write_info(RunInfo(folder.path.name, name, "steadymoe", "1", created, uri))
    folder.config.write_text("seed: 1\n")
    return folder


def test_runs_that_are_not_what_they_should_be(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = here.parent / "home"
    run = _run(home, "first")
    (line,) = _complaints(capsys, ["train", "--resume", "frist"])
    assert line == "run frist: no run has this id or name; did you mean first?"
    (line,) = _complaints(capsys, ["export", "first", "--to", "new"])
    assert re.match(r"run first has no checkpoint in ", line)
    (line,) = _complaints(capsys, ["export", "first", "--to", "texts"])
    assert re.match(r"--to .*/texts: exists and is not empty; name a new folder", line)
    run.config.write_text("seed: many\n")
    (line,) = _complaints(capsys, ["train", "--resume", "first"])
    assert re.match(r"seed: should be a valid integer, got the text 'many' \(set by .*config\.yaml, line 1\)", line)
    _run(home, "first", "2027-01-01T00:00:00+00:00")
    (line,) = _complaints(capsys, ["train", "--resume", "first"])
    assert re.match(r"run first: several runs are meant; name one by its id: ", line)
    (run.path / "run.json").write_text("{")
    (line,) = _complaints(capsys, ["train", "--resume", "first"])
    assert str(run.path / "run.json") in line


@pytest.mark.parametrize("words", [_set(*TEXTS), ["prepare", "texts", "--out", "new", "--tasks", "1"]])
def test_a_ray_cluster_that_is_not_there(
    words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    before = sorted(here.rglob("*"))
    assert _complaints(capsys, words) == [
        f"RAY_ADDRESS: no Ray cluster answers at {address} (Connection refused); unset it, or start one with "
        "steadymoe up"
    ]
    assert sorted(here.rglob("*")) == before
    assert not (here.parent / "home" / "mlflow.db").exists()


def test_a_home_that_cannot_be_written_to(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(here / "lonely.txt"))
    (line,) = _complaints(capsys, _set(*TEXTS))
    assert str(here / "lonely.txt") in line
    monkeypatch.setenv(HOME_VARIABLE, "/proc/steadymoe")
    (line,) = _complaints(capsys, _set(*TEXTS))
    assert "/proc/steadymoe" in line


REAL: list[tuple[list[str], str]] = [
    (["train", "tag.yaml"], "error: tag.yaml, line 1"),
    (["prepare", "missing", "--out", "new"], "error: "),
    (["submit", "--", "train", "micro", "--set", "optimizer.lr=fast"], "error: optimizer.lr: should be a valid number"),
]


@pytest.mark.parametrize(("words", "line"), REAL)
def test_the_command_itself_answers_so(words: list[str], line: str, here: Path) -> None:
    code = (
        "import sys; from infra.cli import main; code = main()\n"
        "print(json.dumps([n for n in ('torch', 'ray', 'mlflow') if n in sys.modules])); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}", *words], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    # What a mistake costs is the imports: those of the heavy libraries take seconds.
    assert json.loads(done.stdout) == []
