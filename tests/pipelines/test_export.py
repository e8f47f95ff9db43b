"""A run's model as transformers loads it."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moe.batch import Batch
from moe.model import Transformer
from moe.parallel import Ranks
from pipelines.checkpoints import load_whole
from pipelines.errors import UserError
from pipelines.export import export
from pipelines.loading import load_config
from pipelines.prepare import prepare
from pipelines.run_folder import RunFolder
from tests.home import home_at
from tests.pipelines.weights import finished_run

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

ALL_PARTS = ("model.mtp.depth=1", "model.attention.q_lora_rank=12", "model.moe.num_groups=4", "model.moe.top_groups=2")
# Raises the biases from 0 far enough to decide who is chosen.
BIASED = ("stability.balance.bias_update_rate=0.1",)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with home_at(tmp_path_factory.mktemp("home")) as path:
        yield path


@pytest.fixture(scope="module")
def run(home: Path) -> RunFolder:
    return finished_run(home, "rich", *ALL_PARTS, *BIASED)


@pytest.fixture(scope="module")
def exported(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("out") / "weights"
    return folder, export(run, folder)


def our_model(run: RunFolder, step: int = 12) -> Transformer:
    """The model built from the checkpoint itself, with its multi-token prediction."""
    model = Transformer(load_config([str(run.config)]).model, Ranks(torch.device("cpu")))
    model.load_state_dict(load_whole(run.checkpoints / f"step-{step:08}", "model."))
    return model


@torch.no_grad()
def our_logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(Batch(torch.nn.functional.pad(ids, (0, 1 + model.config.mtp.depth)))).logits
    return logits


def their_model(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def held_out_ids(run: RunFolder) -> torch.Tensor:
    stream = prepare(load_config([str(run.config)]).data).validation
    return torch.from_numpy(stream.read(0, 4 * 64).astype(np.int64)).view(4, 64)


def test_transformers_computes_the_same_logits_from_the_folder_alone(
    run: RunFolder, exported: tuple[Path, str]
) -> None:
    theirs, ours, ids = their_model(exported[0]), our_model(run), held_out_ids(run)
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        expected = theirs(ids).logits
    found = our_logits(ours, ids)
    assert found.std() > 0.1
    assert (found - expected).abs().max() <= 1e-5
    biases = [layer.mlp.gate.e_score_correction_bias for layer in theirs.model.layers[1:]]
    assert all(bias.abs().max() > 0.05 for bias in biases)


def test_generation_continues_as_our_own_greedy_choice_does(run: RunFolder, exported: tuple[Path, str]) -> None:
    theirs, ours = their_model(exported[0]), our_model(run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported[0])
    prompt = tokenizer("import os\n\ndef é", return_tensors="pt")
    written = theirs.generate(**prompt, max_new_tokens=16, do_sample=False, min_new_tokens=16)
    ids = prompt["input_ids"]
    while ids.shape[1] < written.shape[1]:
        logits = our_logits(ours, ids)[:, -1]
        logits[:, 256] = float("-inf")  # min_new_tokens forbids the end
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    assert written.tolist() == ids.tolist()
    assert tokenizer.decode(written[0]).startswith("import os\n\ndef é")


def test_the_folder_says_what_generation_needs(run: RunFolder, exported: tuple[Path, str]) -> None:
    folder, told = exported
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.bos_token_id, config.eos_token_id, config.max_position_embeddings) == (256, 256, 64)
    assert config.num_nextn_predict_layers == 0
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == 256
    assert "Multi-token prediction has no place in this format and was left out." in told
    assert f"Wrote run rich after 12 steps to {folder}" in told
    with safe_open(folder / "model.safetensors", "pt") as file:
        count = sum(file.get_tensor(n).numel() for n in file.keys() if "correction_bias" not in n)  # noqa: SIM118
    assert f"{count:,} parameters as fp32 in 1 file" in told
    modes = {oct(path.stat().st_mode) for path in folder.iterdir()}
    assert len(modes) == 1


def test_the_printed_snippet_runs(exported: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    lines = exported[1].partition("Load it with transformers:\n")[2].splitlines()
    assert len(lines) == 4
    exec("\n".join(line.removeprefix("  ") for line in lines), {})
    assert capsys.readouterr().out.startswith("import ")


def test_a_checkpoint_of_two_expert_parallel_ranks_gives_the_folder_that_one_process_gives(
    home: Path, run: RunFolder, tmp_path: Path
) -> None:
    """Resaved by two ranks, since two ranks train what one trains to rounding alone."""
    from tests.distributed import run_distributed

    other = RunFolder(home / "runs" / "resaved")
    other.path.mkdir()
    for name in ("config.yaml", "run.json"):
        (other.path / name).write_bytes((run.path / name).read_bytes())
    run_distributed(_resave, 2, run.path, other.path)
    assert len(list((other.checkpoints / "step-00000012").glob("rank-*.safetensors"))) == 2
    folders = [tmp_path / "one", tmp_path / "two"]
    for source, folder in zip((run, other), folders, strict=True):
        export(source, folder)
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]


def _resave(rank: int, world: int, source: Path, target: Path) -> None:
    from moe.parallel import join
    from moe.trainer import Trainer
    from pipelines import checkpoints

    parallel = {"workers": world, "expert_parallel": world, "dense": "shard", "device": "cpu"}
    config = load_config([str(RunFolder(source).config)], [f"parallel={json.dumps(parallel)}"])
    trainer = Trainer(config, join(config.parallel), lambda step: [])
    path = RunFolder(source).checkpoints / "step-00000012"
    restored = checkpoints.load(path, trainer.state())
    trainer.restore(restored["scalars"])
    checkpoints.save(RunFolder(target).checkpoints, trainer.state(), step=12, metadata=restored["metadata"])


def test_an_earlier_step_is_exported_and_the_newest_damaged_one_passed_over(
    home: Path, run: RunFolder, tmp_path: Path
) -> None:
    export(run, tmp_path / "eight", step=8)
    weights = load_file(tmp_path / "eight" / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], our_model(run, 8).head.weight)
    copy = _copied(run, home / "runs" / "damaged")
    shard = next((copy.checkpoints / "step-00000012").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "after 8 steps" in export(copy, tmp_path / "newest")
    with pytest.raises(UserError, match="is damaged: its checksum does not match"):
        export(copy, tmp_path / "named", step=12)
    assert not (tmp_path / "named").exists()


def test_bf16_keeps_the_biases_in_fp32(run: RunFolder, tmp_path: Path) -> None:
    export(run, tmp_path / "half", dtype="bf16")
    stored, whole = load_file(tmp_path / "half" / "model.safetensors"), our_model(run)
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16), name
    assert torch.equal(stored["lm_head.weight"], whole.head.weight.bfloat16())
    theirs = their_model(tmp_path / "half")
    assert theirs.dtype == torch.bfloat16
    router = whole.moe_layers()[0].router
    assert torch.equal(theirs.model.layers[1].mlp.gate.e_score_correction_bias, router.expert_bias_E)


def test_large_weights_are_divided_among_files_with_an_index(
    run: RunFolder, exported: tuple[Path, str], tmp_path: Path
) -> None:
    told = export(run, tmp_path / "parts", max_shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2
    assert f"in {len(files)} files" in told
    assert all((tmp_path / "parts" / name).stat().st_size < 110_000 for name in files)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    one, parts = their_model(exported[0]).state_dict(), their_model(tmp_path / "parts").state_dict()
    assert one.keys() == parts.keys()
    assert all(torch.equal(one[name], parts[name]) for name in one)


def _copied(run: RunFolder, path: Path) -> RunFolder:
    import shutil

    shutil.copytree(run.path, path)
    return RunFolder(path)


def _with_config(run: RunFolder, path: Path, **changes: str) -> RunFolder:
    copy = _copied(run, path)
    text = copy.config.read_text()
    for old, new in changes.items():
        assert f"{old}: " in text
        text = "\n".join(
            line.partition(":")[0] + f": {new}" if line.strip().startswith(f"{old}:") else line
            for line in text.splitlines()
        )
    copy.config.write_text(text)
    return copy


def test_a_model_without_counterpart_is_refused_by_name_before_anything_is_written(
    run: RunFolder, tmp_path: Path
) -> None:
    copy = _with_config(run, tmp_path / "softmax", affinity="softmax", norm_eps="1e-05")
    with pytest.raises(UserError) as caught:
        export(copy, tmp_path / "out")
    assert str(caught.value).startswith("run rich cannot be exported: ")
    assert "model.norm_eps=1e-05" in str(caught.value)
    assert "model.moe.affinity=softmax" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["softmax"]


def _occupied(folder: Path) -> Path:
    (folder / "out").mkdir()
    (folder / "out" / "mine").write_text("keep")
    return folder / "out"


def _file(folder: Path) -> Path:
    (folder / "out").write_text("keep")
    return folder / "out"


def _under_a_file(folder: Path) -> Path:
    (folder / "mine").write_text("keep")
    return folder / "mine" / "out"


@pytest.mark.parametrize(
    ("target", "line"),
    [
        (_occupied, "--to {}: exists and is not empty; name a new folder"),
        (_file, "--to {}: exists; name a new folder"),
        (_under_a_file, "--to {}: cannot be written: Not a directory"),
        (lambda folder: Path("/proc/out"), "--to {}: cannot be written: No such file or directory"),
    ],
)
def test_a_target_that_cannot_be_is_one_line_and_nothing_is_touched(
    run: RunFolder, tmp_path: Path, target: Callable[[Path], Path], line: str
) -> None:
    to = target(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        export(run, to)
    assert str(caught.value) == line.format(to)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_empty_folder_is_filled(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(run, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_nothing_is_left_of_an_export_that_fails_half_way(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.hf_weights.save_file", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        export(run, tmp_path / "mine" / "b" / "c")
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_folders_above_the_target_are_made(run: RunFolder, tmp_path: Path) -> None:
    export(run, tmp_path / "a" / "b" / "c")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c"]


def test_a_step_or_run_without_checkpoint_is_refused(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--step 5: run rich has no checkpoint of this step; it has 4, 8, 12"):
        export(run, tmp_path / "out", step=5)
    copy = _copied(run, tmp_path / "run")
    for path in copy.checkpoints.iterdir():
        (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="run rich has no checkpoint that is whole"):
        export(copy, tmp_path / "out")
    bare = RunFolder(tmp_path / "bare")
    bare.path.mkdir()
    for name in ("config.yaml", "run.json"):
        (bare.path / name).write_bytes((run.path / name).read_bytes())
    with pytest.raises(UserError, match=r"run rich has no checkpoint in .* yet"):
        export(bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_was_altered_since_is_refused(home: Path, tmp_path: Path) -> None:
    from pipelines.hf_tokenizer import byte_tokenizer_json

    file = tmp_path / "mine.json"
    file.write_text(byte_tokenizer_json("<|endoftext|>", 256))
    run = finished_run(home, "own", f"data.tokenizer={file}", "schedule.steps=4")
    export(run, tmp_path / "before")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "before").eos_token == "<|endoftext|>"
    file.write_text(byte_tokenizer_json("</s>", 256))
    with pytest.raises(UserError, match=r"data\.tokenizer: .*mine\.json was altered since run own was trained with it"):
        export(run, tmp_path / "after")
    file.unlink()
    with pytest.raises(UserError, match=r"data\.tokenizer: cannot read .*mine\.json"):
        export(run, tmp_path / "after")
