"""The training loop on plain torch: what it records, saves, and takes up again."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipelines.checkpoints import newest_valid
from pipelines.loop import Ending
from pipelines.run_folder import RunFolder
from tests.distributed import run_distributed
from tests.pipelines.small_run import metrics_of, run_loop


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))


def test_every_step_validation_and_checkpoint_of_a_run_is_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_loop(0, 1, run, ()) == Ending("finished", 12)
    steps = metrics_of(run)
    assert sorted(steps) == list(range(1, 13))
    assert steps[12]["train/loss"] < steps[1]["train/loss"]
    assert max(s["train/loss_max"] for s in steps.values()) == max(s["train/loss"] for s in steps.values())
    assert sorted(metrics_of(run, "validation")) == [5, 10, 12]
    final = metrics_of(run, "validation")[12]
    assert 0 <= final["moe/dead_experts"] < 8
    assert final["val/nats_per_byte"] > final["val/loss"]  # document tokens are predicted, but are no bytes of text
    assert metrics_of(run, "start")[0]["model/active_parameters"] < metrics_of(run, "start")[0]["model/parameters"]
    assert sorted(path.name for path in RunFolder(run).checkpoints.iterdir()) == [
        f"step-{step:08}" for step in (4, 8, 12)
    ]


def test_points_are_recorded_at_the_interval_and_at_the_end(tmp_path: Path) -> None:
    run_loop(0, 1, tmp_path / "run", ("tracking.every_steps=5", "tracking.per_layer=true"))
    steps = metrics_of(tmp_path / "run")
    assert sorted(steps) == [5, 10, 12]
    assert "moe_max_vio/layer_00" in steps[5]


def test_two_runs_of_one_seed_are_equal_bit_for_bit_and_another_seed_is_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_loop(0, 1, tmp_path / name, (f"seed={seed}",))
    a, b, c = (metrics_of(tmp_path / name) for name in "abc")
    assert a == b
    assert a[12] != c[12]


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (1, ()),
        (2, ("parallel.expert_parallel=2",)),
        (2, ("parallel.dense=shard", "data.micro_batch_size=2", "model.mtp.depth=1")),
    ],
)
def test_a_run_cut_off_and_resumed_equals_an_undisturbed_one_bit_for_bit(
    tmp_path: Path, world: int, settings: tuple[str, ...]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_distributed(run_loop, world, whole, settings)
    # What is left of a run that was killed between its checkpoints at steps 8 and 12.
    shutil.copytree(whole, cut)
    shutil.rmtree(RunFolder(cut).checkpoints / "step-00000012")
    RunFolder(cut).spool.unlink()
    endings = run_distributed(run_loop, world, cut, settings)
    assert endings == [Ending("finished", 12)] * world
    assert sorted(metrics_of(cut)) == [9, 10, 11, 12]
    for kind in ("train", "validation"):
        undisturbed = {s: m for s, m in metrics_of(whole, kind).items() if s > 8}
        assert {s: _without_windows(m) for s, m in metrics_of(cut, kind).items()} == {
            s: _without_windows(m) for s, m in undisturbed.items()
        }


def _without_windows(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name != "train/loss_max"}


def test_a_resumed_run_may_have_another_number_of_workers(tmp_path: Path) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run_distributed(run_loop, 1, whole, ())
    shutil.copytree(whole, moved)
    shutil.rmtree(RunFolder(moved).checkpoints / "step-00000012")
    RunFolder(moved).spool.unlink()
    run_distributed(run_loop, 2, moved, ("parallel.expert_parallel=2",))
    expected, actual = metrics_of(whole), metrics_of(moved)
    for step in range(9, 13):
        assert actual[step]["train/loss"] == pytest.approx(expected[step]["train/loss"], rel=1e-5)


def test_a_longer_schedule_continues_a_finished_run(tmp_path: Path) -> None:
    run_loop(0, 1, tmp_path / "run", ())
    assert run_loop(0, 1, tmp_path / "run", ("schedule.steps=15",)) == Ending("finished", 15)
    assert sorted(metrics_of(tmp_path / "run")) == list(range(1, 16))


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    run_loop(0, 1, tmp_path / "run", ())
    folder = RunFolder(tmp_path / "run").checkpoints
    shard = next((folder / "step-00000012").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert newest_valid(folder) == folder / "step-00000008"
    run_loop(0, 1, tmp_path / "run", ())
    assert newest_valid(folder) == folder / "step-00000012"


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_whose_loss_is_not_finite_ends_at_once_and_saves_nothing(tmp_path: Path, world: int) -> None:
    run = tmp_path / "run"
    run_distributed(run_loop, world, run, ("schedule.steps=4", "checkpoint.every_steps=4"))
    spoilt = next((RunFolder(run).checkpoints / "step-00000004").glob("*.safetensors"))
    _spoil(spoilt)
    endings = run_distributed(run_loop, world, run, ("schedule.steps=12",))
    assert {ending.outcome for ending in endings} == {"diverged"}
    assert endings[0].step == 5
    assert "step 5" in (endings[0].reason or "")
    assert [path.name for path in RunFolder(run).checkpoints.iterdir()] == ["step-00000004"]


def _spoil(shard: Path) -> None:
    """Put NaN into a weight of a checkpoint, and make its checksums hold again."""
    manifest_path = shard.parent / "manifest.json"
    tensors = load_file(shard)
    name = next(name for name in tensors if name.startswith("model.layers.0"))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, shard)
    document = json.loads(manifest_path.read_text())
    checksum = hashlib.sha256(shard.read_bytes()).hexdigest()
    document["manifest"]["files"][shard.name] = {"size": shard.stat().st_size, "sha256": checksum}
    content = json.dumps(document["manifest"], sort_keys=True).encode()
    document["sha256"] = hashlib.sha256(content).hexdigest()
    manifest_path.write_text(json.dumps(document))
