"""Training that starts from a folder of weights: what is taken from it, and what is refused."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file

from moe.parallel import join
from moe.trainer import Trainer
from pipelines.checkpoints import load_whole
from pipelines.config import RunConfig
from pipelines.data import TokenDataset, TrainBatches
from pipelines.errors import UserError
from pipelines.export import export
from pipelines.hf_tokenizer import byte_tokenizer_json
from pipelines.hf_weights import load_weights
from pipelines.init_from import check_start
from pipelines.loading import load_config
from pipelines.loop import train
from pipelines.prepare import prepare
from pipelines.run_folder import RunFolder
from tests.distributed import run_distributed
from tests.home import home_at
from tests.moe.tiny import weights as whole_weights
from tests.pipelines.small_run import SETTINGS, metrics_of
from tests.pipelines.weights import edit_config, edit_weights, finished_run

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with home_at(tmp_path_factory.mktemp("home")) as path:
        yield path


@pytest.fixture(scope="module")
def run(home: Path) -> RunFolder:
    # A shape that is no preset's, and biases that have moved.
    shape = ("model.hidden_size=40", "model.moe.num_experts=4", "model.attention.q_lora_rank=12")
    return finished_run(home, "source", *shape, "stability.balance.bias_update_rate=0.05", "schedule.steps=11")


@pytest.fixture(scope="module")
def exported(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "weights"
    export(run, folder)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(exported, tmp_path / "weights"))


def config_from(folder: Path, *settings: str) -> RunConfig:
    return load_config(["micro"], [*SETTINGS, *settings], folder)


def check(folder: Path, *settings: str) -> str:
    """Everything that the driver checks; what it says."""
    console = Console(record=True, width=1000, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    check_start(folder, None, config_from(folder, *settings), console)
    return console.export_text()


def refusal(folder: Path, *settings: str) -> str:
    with pytest.raises(UserError) as caught:
        check(folder, *settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def started(rank: int, world: int, folder: Path, *settings: str) -> Any:
    """Whole weights and biases, moments' largest value and scalars of a trainer that has read the folder."""
    config = config_from(folder, f"parallel.workers={world}", *settings)
    trainer = Trainer(config, join(config.parallel), lambda step: [])
    load_weights(trainer.state(), config.model, folder)
    moments = [tensor for by_name in trainer.optimizer.moments().values() for tensor in by_name.values()]
    return whole_weights(trainer), max(float(m.abs().max()) for m in moments if m.numel()), trainer.state().scalars


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (1, ()),
        pytest.param(2, ("parallel.expert_parallel=2",), marks=pytest.mark.slow),
        (2, ("parallel.expert_parallel=2", "parallel.dense=shard")),
        pytest.param(4, ("parallel.expert_parallel=2", "parallel.dense=shard"), marks=pytest.mark.slow),
    ],
)
def test_every_rank_starts_from_the_weights_and_biases_of_the_run_that_was_exported(
    run: RunFolder, exported: Path, world: int, settings: tuple[str, ...]
) -> None:
    saved = load_whole(run.checkpoints / "step-00000011", "model.")
    assert any(tensor.abs().max() > 0.01 for name, tensor in saved.items() if name.endswith("expert_bias_E"))
    for found, moments, scalars in run_distributed(started, world, exported, *settings):
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
        assert moments == 0
        assert scalars == {"steps_done": 0, "updates": 0}


def test_the_first_step_has_the_loss_that_transformers_computes_from_the_folder(exported: Path, tmp_path: Path) -> None:
    config = config_from(exported, "schedule.steps=2")
    shards = prepare(config.data)
    train(config, join(config.parallel), shards, RunFolder(tmp_path / "run"), exported)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    stream = shards.train.read(0, len(shards.train)).astype(np.int64)
    samples = TrainBatches(TokenDataset(shards.train, 64), config, 0, 1).sample_ids(0)
    ids = torch.from_numpy(np.stack([stream[s * 64 : s * 64 + 65] for s in samples]))
    with torch.no_grad():
        expected = F.cross_entropy(theirs(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    loss = metrics_of(tmp_path / "run")[1]["train/loss"]
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert loss < 5, "an untrained model has ln 257 = 5.55"


def test_a_run_that_has_saved_continues_from_its_own_checkpoint_and_not_from_the_folder(
    exported: Path, tmp_path: Path
) -> None:
    config = config_from(exported)
    shards, ranks = prepare(config.data), join(config.parallel)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config, ranks, shards, RunFolder(whole), exported)
    shutil.copytree(whole, cut)
    shutil.rmtree(RunFolder(cut).checkpoints / "step-00000012")
    RunFolder(cut).spool.unlink()
    train(config, ranks, shards, RunFolder(cut), tmp_path / "gone")
    assert sorted(metrics_of(cut)) == [9, 10, 11, 12]
    assert metrics_of(cut)[12]["train/loss"] == metrics_of(whole)[12]["train/loss"]


def test_a_resumed_run_needs_its_weights_only_until_its_first_checkpoint(
    run: RunFolder, exported: Path, tmp_path: Path
) -> None:
    resumed = RunFolder(tmp_path)
    assert resumed.init_from is None
    resumed.write_init_from(exported)
    assert resumed.init_from == exported
    config = config_from(exported)
    check_start(exported, resumed, config, Console(quiet=True))
    with pytest.raises(UserError, match="gone"):
        check_start(tmp_path / "gone", resumed, config, Console(quiet=True))
    check_start(tmp_path / "gone", run, config, Console(quiet=True))


def test_multi_token_prediction_starts_as_random_as_without_weights(exported: Path) -> None:
    settings = ("model.mtp.depth=1", "seed=3")
    assert "multi-token prediction starts from random weights" in check(exported, *settings)
    assert "multi-token prediction" not in check(exported)
    config = config_from(exported, *settings)
    fresh = Trainer(config, join(config.parallel), lambda step: [])
    found, _, _ = started(0, 1, exported, *settings)
    ahead = [name for name in found if name.startswith("mtp.")]
    assert ahead
    assert all(torch.equal(found[name], whole_weights(fresh)[name]) for name in ahead)
    assert not torch.equal(found["embed.weight"], whole_weights(fresh)["embed.weight"])


def test_a_folder_that_transformers_saved_is_read_with_its_files_divided_and_in_bf16(
    exported: Path, tmp_path: Path
) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert "no tokenizer.json" in check(tmp_path / "again")
    (found, _, _), (exact, _, _) = started(0, 1, tmp_path / "again"), started(0, 1, exported)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        expected = exact[name] if name.endswith("expert_bias_E") else exact[name].bfloat16().float()
        assert torch.equal(tensor, expected), name


def test_layers_ahead_as_deepseek_stores_them_are_passed_over_with_a_word(folder: Path) -> None:
    edit_config(folder, num_nextn_predict_layers=1)
    edit_weights(folder, model__layers__2__eh_proj__weight=torch.zeros(40, 80))
    assert "its multi-token prediction is not read" in check(folder)
    started(0, 1, folder)


# ---- the model section ----------------------------------------------------------------------------------------------


def test_the_folder_decides_the_shape_and_presets_give_way(run: RunFolder, exported: Path) -> None:
    source = load_config([str(run.config)]).model
    for preset in ("micro", "small", "dense-tiny", "deepseek-moe-16b"):
        model = load_config([preset], ["parallel.expert_parallel=1"], exported).model
        kept = load_config([preset]).model
        assert model == source.model_copy(update={"mtp": kept.mtp, "init": kept.init})


def test_the_shape_of_the_preset_cannot_get_in_the_way(tmp_path: Path, folder: Path) -> None:
    """micro has 8 experts, which do not divide by 3; the folder's 9 do."""
    edit_config(folder, n_routed_experts=9)
    settings = ["parallel.workers=3", "parallel.expert_parallel=3", "data.global_batch_size=6"]
    assert load_config(["micro"], settings, folder).model.moe.num_experts == 9
    with pytest.raises(UserError, match=r"model\.moe\.num_experts \(9\) is not divisible by parallel\.expert_parallel"):
        load_config(["micro"], ["parallel.workers=2", "parallel.expert_parallel=2"], folder)


def test_what_the_user_says_of_the_shape_must_agree(exported: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {hidden_size: 48, moe: {top_k: 2}}\n")
    agreeing = ["model.hidden_size=40", "model.rope_theta=10000", "model.attention.kind=mla", "model.vocab_size=null"]
    assert load_config(["micro"], agreeing, exported) == load_config(["micro"], [], exported)
    with pytest.raises(UserError) as caught:
        load_config(["micro", str(mine)], ["model.moe.num_experts=8", "model.mtp.depth=1"], exported)
    where = exported / "config.json"
    assert str(caught.value).splitlines() == [
        f"model.hidden_size: 48 (set by {mine}, line 1) is not what {where} says, 40; leave it out",
        f"model.moe.num_experts: 8 (set by --set) is not what {where} says, 4; leave it out",
    ]


@pytest.mark.parametrize("setting", ["model.hiden_size=40", "model.moe.foo=1", "model=3", "model.hidden_size.x=1"])
def test_keys_that_are_wrong_without_weights_are_wrong_with_them(exported: Path, setting: str) -> None:
    with pytest.raises(UserError, match=r"^model") as caught:
        load_config(["micro"], [setting], exported)
    assert "leave it out" not in str(caught.value)


# ---- wrong folders --------------------------------------------------------------------------------------------------


def test_a_folder_of_pickles_is_refused_and_runs_no_code(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    content = pickle.dumps(_Planted(proof))
    with pytest.raises(ZeroDivisionError):
        pickle.loads(content)
    assert proof.exists(), "the pickle is armed"
    proof.unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(content)
    (folder / "modeling_planted.py").write_text(f"open({str(proof)!r}, 'w')\n")
    edit_config(folder, auto_map={"AutoConfig": "modeling_planted.C", "AutoModelForCausalLM": "modeling_planted.M"})
    check(folder)
    started(0, 1, folder)
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    assert "model.safetensors is missing; " in message
    assert "is a pickle, which can run code when it is read: convert it to safetensors first" in message
    assert not proof.exists()


class _Planted:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.proof)!r}, 'w').close(); 1 / 0",)


def _index_out_of_the_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))


def _cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _fp8(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")


def _other_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(byte_tokenizer_json("</s>", 256))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "another architecture": (lambda f: edit_config(f, model_type="llama"), "config.json: model_type is 'llama'; only"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read: No such file"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "config.json: should hold a JSON object"),
    "nonsense": (lambda f: edit_config(f, hidden_size=-4), "config.json: hidden_size: Input should be greater than 0"),
    "yarn": (lambda f: edit_config(f, rope_parameters={"rope_type": "yarn"}), "does not have rope type yarn"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "cut short": (_cut_short, "model.safetensors cannot be read"),
    "another width": (
        lambda f: edit_config(f, moe_intermediate_size=16),
        "down_proj.weight is [40, 32], but [40, 16]",
    ),
    "more layers": (lambda f: edit_config(f, num_hidden_layers=3), "tensors of its config.json's model are missing,"),
    "fewer experts": (lambda f: edit_config(f, n_routed_experts=3), "3 tensors are not of its config.json's model"),
    "a tensor short": (
        lambda f: edit_weights(f, lm_head__weight=None),
        "1 tensors of its config.json's model are missing",
    ),
    "fp8": (_fp8, "lm_head.weight is stored as F8_E4M3; only BF16, F16, F32, F64 can be read"),
    "index that points outside": (_index_out_of_the_folder, "files in this folder, not ../other.safetensors"),
    "another tokenizer": (_other_tokenizer, "tokenizer.json is not the tokenizer of the text (byte)"),
    "no folder": (lambda f: shutil.rmtree(f), "no such folder of weights (they are read from disk, never downloaded)"),
}


@pytest.mark.parametrize(("spoil", "named"), SPOILT.values(), ids=SPOILT.keys())
def test_a_wrong_folder_is_refused_in_one_line(folder: Path, spoil: Callable[[Path], object], named: str) -> None:
    check(folder)
    spoil(folder)
    message = refusal(folder)
    assert message.startswith(str(folder))
    assert named in message
