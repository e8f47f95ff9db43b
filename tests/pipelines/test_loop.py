"""The training loop on plain torch: what it records, saves, and takes up again."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipelines.checkpoint_manifest import checkpoint_folders, read_manifest
from pipelines.checkpoint_standing import newest_valid, standing
from pipelines.checkpoints import CheckpointError
from pipelines.errors import UserError
from pipelines.notes import read_notes
from pipelines.outcome import Ending
from pipelines.run_folder import RunFolder
from pipelines.run_lock import is_written_to, writer_lock
from tests.distributed import run_distributed
from tests.pipelines.small_run import metrics_of, run_loop

FORKSERVER = multiprocessing.get_context("forkserver")


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
    settings = ("tracking.every_steps=5", "tracking.per_layer=true", "monitors.every_steps=10")
    run_loop(0, 1, tmp_path / "run", settings)
    steps = metrics_of(tmp_path / "run")
    assert sorted(steps) == [5, 10, 12]
    assert "moe_max_vio/layer_00" in steps[5]
    for headline in ("activation/expert_max", "activation/residual_rms", "attention/logit_max"):
        layers = [value for name, value in steps[10].items() if name.startswith(f"{headline.replace('/', '_')}/layer_")]
        assert max(layers) == steps[10][headline]
    assert not any(name.startswith("attention_logit_max") for name in steps[5])


def test_a_stage_that_begins_is_noted_once_even_if_the_run_is_cut_off(tmp_path: Path) -> None:
    stages = (
        "schedule={kind: stages, stages: [{steps: 6, global_batch_size: 4, sequence_length: 32}, "
        "{tokens: 2500, lr: {kind: cosine}}]}"
    )
    run = RunFolder(tmp_path / "run")
    ending = run_loop(0, 1, run.path, (stages,))
    assert ending == Ending("finished", 6 + 2500 // (8 * 64) + 1)
    shutil.rmtree(run.checkpoints / "step-00000008")
    shutil.rmtree(run.checkpoints / f"step-{ending.step:08}")
    whole = metrics_of(run.path)
    assert [whole[step]["train/stage"] for step in (1, 6, 7, ending.step)] == [1, 1, 2, 2]
    assert run_loop(0, 1, run.path, (stages,)) == ending
    assert metrics_of(run.path) == whole
    assert [note.text for note in read_notes(run.notes) if note.kind == "stage"] == [
        "step 7: stage 2 of 2 begins, with batches of 8 x 64 tokens"
    ]


def test_every_spike_of_the_loss_is_noted_once_even_if_the_run_is_cut_off(tmp_path: Path) -> None:
    limits = "detector={kind: robust, warn: 0.7, act: 0.7, window: 20}"  # so that noise will do
    settings = ("schedule.steps=48", "checkpoint.every_steps=20", "response.kind=record", limits)
    run = RunFolder(tmp_path / "run")
    ending = run_loop(0, 1, run.path, settings)
    shutil.rmtree(run.checkpoints / f"step-{ending.step:08}")
    assert run_loop(0, 1, run.path, settings) == ending
    scores = {step: metrics.get("spike/score_loss", 0.0) for step, metrics in metrics_of(run.path).items()}
    spikes = [step for step, score in scores.items() if score >= 0.7]
    assert 2 < len(spikes) < 18
    noted = [note.text for note in read_notes(run.notes) if note.kind == "spike"]
    assert [int(text.removeprefix("step ").partition(":")[0]) for text in noted] == spikes
    assert f": loss {metrics_of(run.path)[spikes[0]]['train/loss']:.4g} is {scores[spikes[0]]:.1f} robust" in noted[0]


def test_steps_whose_health_was_measured_are_recorded_as_well(tmp_path: Path) -> None:
    run_loop(0, 1, tmp_path / "run", ("tracking.every_steps=5", "monitors.every_steps=4"))
    steps = metrics_of(tmp_path / "run")
    assert sorted(steps) == [4, 5, 8, 10, 12]
    assert [step for step, metrics in steps.items() if "activation/expert_max" in metrics] == [4, 8, 12]


def test_a_start_that_is_not_the_configs_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="before the first step"):
        run_loop(0, 1, tmp_path / "run", ("model.init.std=1.0e+30",))
    assert not RunFolder(tmp_path / "run").spool.exists()


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
    assert [read_manifest(path).timeline for path in checkpoint_folders(folder)] == [0, 0, 1]


def _run_on_a_small_disk(rank: int, world: int, run: Path, free: int) -> str:
    prepared = ("checkpoint.every_steps=3",)
    run_loop(rank, world, run, (*prepared, "schedule.steps=3", "schedule.decay.kind=constant"))
    # Python ignores SIGXFSZ, so that writing past this many bytes is an error like that of a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as caught:
        run_loop(rank, world, run, (*prepared, "schedule.decay.kind=constant"))
    return str(caught.value)


@pytest.mark.parametrize("world", [1, 2])
def test_on_a_full_disk_training_goes_on_and_the_old_checkpoint_stays(tmp_path: Path, world: int) -> None:
    run, constant = tmp_path / "run", ("schedule.decay.kind=constant", "checkpoint.every_steps=3")
    run_distributed(run_loop, world, tmp_path / "whole", constant)
    complaints = run_distributed(_run_on_a_small_disk, world, run, 200_000)
    # All steps were taken; that the last state is lost is the end of the command, and not a silent one.
    assert complaints == [complaints[0]] * world
    assert complaints[0].startswith("the checkpoint of step 12 could not be written")
    assert "the last one is of step 3" in complaints[0]
    assert metrics_of(run) == metrics_of(tmp_path / "whole")
    notes = [note.text for note in read_notes(RunFolder(run).notes) if note.kind == "checkpoint"]
    assert [text.partition(" could not be written, training goes on: ")[0] for text in notes] == [
        "the checkpoint of step 6", "the checkpoint of step 9"
    ]  # fmt: skip
    assert newest_valid(RunFolder(run).checkpoints) == RunFolder(run).checkpoints / "step-00000003"
    assert run_distributed(run_loop, world, run, constant) == [Ending("finished", 12)] * world
    ours, theirs = (RunFolder(folder).checkpoints / "step-00000012" for folder in (run, tmp_path / "whole"))
    for file in theirs.glob("*.safetensors"):
        assert (ours / file.name).read_bytes() == file.read_bytes()


def _run_saving_each_step(run: Path) -> None:
    settings = ("schedule.steps=24", "checkpoint.every_steps=1", "checkpoint.keep=2")
    assert run_loop(0, 1, run, settings) == Ending("finished", 24)


def _being_written(run: Path) -> set[int]:
    """The files of checkpoints that have not got their name yet, by inode."""
    found = set()
    for folder in RunFolder(run).checkpoints.glob(".step-*"):
        with contextlib.suppress(FileNotFoundError):
            found |= {entry.inode() for entry in os.scandir(folder) if entry.name.endswith(".safetensors")}
    return found


def test_a_run_killed_while_it_writes_checkpoints_equals_an_undisturbed_one(tmp_path: Path) -> None:
    _run_saving_each_step(tmp_path / "whole")
    run, torn = tmp_path / "run", 0
    for _ in range(200):
        # What an earlier process left torn is not this one's.
        left = _being_written(run)
        process = FORKSERVER.Process(target=_run_saving_each_step, args=(run,), daemon=True)
        process.start()
        while torn < 3 and process.is_alive():
            if _being_written(run) - left:
                process.kill()
                process.join()
                # Without what it was writing, the save was quicker than the kill, and the next process gets it.
                torn += bool(_being_written(run) - left)
        process.join()
        if process.exitcode == 0:
            break
    assert (process.exitcode, torn) == (0, 3)
    assert metrics_of(run) == metrics_of(tmp_path / "whole")
    assert not any(RunFolder(run).checkpoints.glob(".step-*"))


def test_an_older_checkpoint_with_a_damaged_manifest_is_in_nobodys_way(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_distributed(run_loop, 2, run, ("checkpoint.confirm_steps=99",))
    (RunFolder(run).checkpoints / "step-00000004" / "manifest.json").write_text("{")
    assert run_distributed(run_loop, 2, run, ("schedule.steps=14",)) == [Ending("finished", 14)] * 2


def test_a_stop_is_taken_at_the_same_step_by_all_ranks_and_saved(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.stop.touch()
    reason = "asked to stop at step 1"
    assert run_distributed(run_loop, 2, run.path, ()) == [Ending("stopped", 1, reason)] * 2
    assert newest_valid(run.checkpoints) == run.checkpoints / "step-00000001"
    run.stop.unlink()
    assert run_distributed(run_loop, 2, run.path, ()) == [Ending("finished", 12)] * 2
    run_distributed(run_loop, 2, tmp_path / "whole", ())
    assert metrics_of(run.path) == metrics_of(tmp_path / "whole")


def test_checkpoints_become_good_after_enough_further_steps(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run").checkpoints
    settings = ("checkpoint.every_steps=2", "checkpoint.keep=9", "checkpoint.confirm_steps=5")
    run_loop(0, 1, folder.parent, (*settings, "schedule.steps=6"))
    states = {path.name[-2:]: standing(path).state for path in checkpoint_folders(folder)}
    assert states == {"02": "unconfirmed", "04": "unconfirmed", "06": "unconfirmed"}
    # The wait goes on where the run was cut off.
    run_loop(0, 1, folder.parent, (*settings, "schedule.steps=12"))
    states = {path.name[-2:]: standing(path).state for path in checkpoint_folders(folder)}
    assert states == {
        "02": "good", "04": "good", "06": "good", "08": "unconfirmed", "10": "unconfirmed", "12": "unconfirmed"
    }  # fmt: skip


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
    (spoilt_path,) = checkpoint_folders(RunFolder(run).checkpoints)
    # What was saved so shortly before may be the cause, and here it is: nobody resumes from it again.
    assert (spoilt_path.name, standing(spoilt_path).state) == ("step-00000004", "suspect")
    # Cut off before it has saved anything, it has left the old timeline all the same.
    assert run_distributed(_cut_off, world, run, ("schedule.steps=5",)) == ["cut off"] * world
    assert run_distributed(run_loop, world, run, ("schedule.steps=5",)) == [Ending("finished", 5)] * world
    assert read_manifest(RunFolder(run).checkpoints / "step-00000005").timeline == 1


def _cut_off(rank: int, world: int, run: Path, settings: tuple[str, ...]) -> str:
    """Run the loop up to where it would save."""
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(InterruptedError):
        patch.setattr("pipelines.checkpoints.save", _interrupted)
        run_loop(rank, world, run, settings)
        return "saved"
    return "cut off"


def _interrupted(*_: object, **__: object) -> None:
    raise InterruptedError


@pytest.mark.slow
def test_a_worker_waits_for_one_that_a_killed_command_has_left_behind(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert not is_written_to(run)
    with ThreadPoolExecutor(1) as successor:
        with writer_lock(run, patience_s=0.0):
            assert is_written_to(run)
            ending = successor.submit(run_loop, 0, 1, run.path, ())
            with pytest.raises(TimeoutError):
                ending.result(timeout=3)
            assert not run.spool.exists()
        assert ending.result() == Ending("finished", 12)
    assert not is_written_to(run)


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
