import hashlib
import json
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moe.state import JSON, TrainingState
from pipelines.checkpoints import CheckpointError, load, newest_valid, prune, save, verify
from tests.distributed import run_distributed

SCALARS: dict[str, JSON] = {
    "steps_done": 100,
    "lr_factor": 0.1 + 0.2,
    "best": float("inf"),
    "skipped": [3, 5],
    "rng": 2**90 + 1,
}
METADATA: dict[str, JSON] = {"config": {"seed": 7}}


def _reference() -> dict[str, torch.Tensor]:
    """What the state holds, whole, the same on every rank."""
    g = torch.Generator().manual_seed(0)
    return {
        "model.norm": torch.randn(5, generator=g),
        "model.temperature": torch.tensor(1.25),
        "model.step": torch.tensor(2**40 + 1),
        "model.mask": torch.tensor([True, False, True]),
        "model.nothing": torch.zeros(0, 3),
        "model.half": torch.randn(4, 4, generator=g).bfloat16(),
        "model.nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        # Expert-parallel: 8 experts divide by every degree.
        "model.experts.w_up": torch.randn(8, 3, 2, generator=g),
        "optimizer.exp_avg.experts.w_up": torch.randn(8, 3, 2, generator=g),
        # Over all ranks, unevenly: torch.chunk gives 4 ranks 2, 2, 2, 1 rows, and of 3 rows the last rank none.
        "model.dense": torch.randn(7, 2, generator=g),
        "model.small": torch.randn(3, 2, generator=g),
        "model.single": torch.randn(1, 4, generator=g),
    }


def _state(ep: int, fill: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> TrainingState:
    """The reference, laid out for this world: experts over "ep", dense parameters over all ranks."""
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world // ep, ep), mesh_dim_names=("replica", "ep"))
    everyone = mesh._flatten("world")
    tensors: dict[str, torch.Tensor] = {}
    for name, whole in _reference().items():
        whole = fill(whole)
        if "experts" in name:
            whole = distribute_tensor(whole, mesh, [Replicate(), Shard(0)])
        elif name in ("model.dense", "model.small", "model.single"):
            whole = torch.nn.Parameter(distribute_tensor(whole, everyone, [Shard(0)]))
        elif name == "model.norm":
            whole = torch.nn.Parameter(whole)
        tensors[name] = whole
    return TrainingState(tensors, SCALARS)


def _save(rank: int, world_size: int, folder: Path, ep: int, step: int) -> Path:
    return save(folder, _state(ep), step=step, metadata=METADATA)


def _load(rank: int, world_size: int, path: Path, ep: int) -> tuple[Any, dict[str, torch.Tensor], list[int]]:
    state = _state(ep, torch.zeros_like)
    before = {name: _local(tensor).data_ptr() for name, tensor in state.tensors.items()}
    rest = load(path, state)
    assert before == {name: _local(tensor).data_ptr() for name, tensor in state.tensors.items()}, "not filled in place"
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.tensors.items()}
    return (
        rest,
        {n: t.detach() for n, t in whole.items()},
        [_local(state.tensors[n]).shape[0] for n in ("model.dense", "model.small", "model.single")],
    )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bits(tensor: torch.Tensor) -> tuple[str, list[int], bytes]:
    return str(tensor.dtype), list(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _headers(path: Path) -> dict[str, dict[str, Any]]:
    """Of every file in a checkpoint but the manifest, what its safetensors header says, read by the format's text."""
    headers = {}
    for file in sorted(path.iterdir()):
        if file.name != "manifest.json":
            content = file.read_bytes()
            (length,) = struct.unpack("<Q", content[:8])
            headers[file.name] = json.loads(content[8 : 8 + length])
            end = max(entry["data_offsets"][1] for name, entry in headers[file.name].items() if name != "__metadata__")
            assert 8 + length + end == len(content), f"{file} holds more than its header says"
    return headers


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 100 and 200, saved by one process alone."""
    for step in (100, 200):
        save(tmp_path, TrainingState(_reference(), SCALARS), step=step, metadata=METADATA)
    return tmp_path


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        # (ranks, expert parallelism)
        ((1, 1), (1, 1)),
        ((2, 2), (2, 2)),
        ((4, 2), (4, 2)),
        ((1, 1), (2, 2)),
        ((2, 2), (1, 1)),
        ((2, 1), (2, 2)),
        ((2, 2), (4, 2)),
        ((4, 4), (2, 1)),
        ((3, 1), (4, 4)),
    ],
)
def test_every_bit_comes_back_on_any_number_of_ranks(
    tmp_path: Path, saved: tuple[int, int], loaded: tuple[int, int]
) -> None:
    paths = run_distributed(_save, saved[0], tmp_path, saved[1], 100)
    assert set(paths) == {tmp_path / "step-00000100"}
    assert newest_valid(tmp_path) == paths[0]
    shards = []
    for rest, tensors, rows in run_distributed(_load, loaded[0], paths[0], loaded[1]):
        assert rest == {"step": 100, "timeline": 0, "scalars": SCALARS, "metadata": METADATA}
        assert {n: _bits(t) for n, t in tensors.items()} == {n: _bits(t) for n, t in _reference().items()}
        shards.append(rows)
    if loaded[0] == 4:
        assert shards == [[2, 1, 1], [2, 1, 0], [2, 1, 0], [1, 0, 0]], "the uneven cases are what they should be"


def test_what_several_ranks_hold_is_written_once_and_spread_over_them(tmp_path: Path) -> None:
    (path, *_) = run_distributed(_save, 4, tmp_path, 2, 100)
    headers = _headers(path)
    stored: dict[str, int] = {}
    for header in headers.values():
        for name, entry in header.items():
            if name != "__metadata__":
                stored[name] = stored.get(name, 0) + entry["data_offsets"][1] - entry["data_offsets"][0]
    assert stored == {n: t.nbytes for n, t in _reference().items() if t.numel()}
    assert len(headers) == 4
    sizes = [
        sum(e["data_offsets"][1] - e["data_offsets"][0] for n, e in h.items() if n[0] != "_") for h in headers.values()
    ]
    assert max(sizes) - min(sizes) <= max(_reference()["model.experts.w_up"].nbytes // 2, 1)


def test_the_manifest_says_where_every_row_is(tmp_path: Path) -> None:
    (path, *_) = run_distributed(_save, 4, tmp_path, 2, 100)
    manifest, headers = verify(path), _headers(path)
    assert set(manifest.files) == set(headers)
    for name, whole in _reference().items():
        record = manifest.tensors[name]
        assert record.shape == whole.shape
        assert f"torch.{record.dtype}" == str(whole.dtype)
        for piece in record.pieces:
            assert headers[piece.file][name]["shape"] == [
                *([piece.stop - piece.start] if whole.dim() else []),
                *whole.shape[1:],
            ]
    assert [(p.start, p.stop) for p in manifest.tensors["model.dense"].pieces] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert [(p.start, p.stop) for p in manifest.tensors["model.experts.w_up"].pieces] == [(0, 4), (4, 8)]


def test_one_process_needs_no_process_group(tmp_path: Path) -> None:
    path = save(tmp_path, TrainingState({"w": torch.arange(6.0).view(3, 2)}, {"n": 1}), step=3, metadata={})
    state = TrainingState({"w": torch.zeros(3, 2)})
    assert load(path, state) == {"step": 3, "timeline": 0, "scalars": {"n": 1}, "metadata": {}}
    assert state.tensors["w"].tolist() == [[0, 1], [2, 3], [4, 5]]


def _shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (_shorten, "rank-00000.safetensors", "bytes where"),
        (_flip_a_bit, "rank-00000.safetensors", "checksum does not match"),
        (Path.unlink, "rank-00000.safetensors", "No such file"),
        (_shorten, "manifest.json", "cannot be read"),
        (
            lambda file: file.write_text(file.read_text().replace('"step": 200', '"step": 300')),
            "manifest.json",
            "damaged",
        ),
        (Path.unlink, "manifest.json", "has no manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_found(
    checkpoints: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], file: str, reason: str
) -> None:
    newest = checkpoints / "step-00000200"
    assert newest_valid(checkpoints) == newest
    damage(newest / file)
    with pytest.raises(CheckpointError, match=reason):
        verify(newest)
    assert newest_valid(checkpoints) == checkpoints / "step-00000100"
    assert reason in caplog.text
    assert str(newest) in caplog.text


def test_a_truncated_file_stops_loading_on_every_rank(checkpoints: Path) -> None:
    _shorten(checkpoints / "step-00000200" / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match="bytes where"):
        run_distributed(_load, 2, checkpoints / "step-00000200", 2)


def test_nothing_valid_gives_none(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "absent") is None
    (tmp_path / "step-00000100").mkdir()
    assert newest_valid(tmp_path) is None


def test_foreign_files_are_ignored(checkpoints: Path) -> None:
    path = checkpoints / "step-00000200"
    (path / "rank-00099.safetensors").write_bytes(b"not even safetensors")
    (path / "notes.pt").write_bytes(b"\x80\x02.")
    (checkpoints / "step-final").mkdir()
    assert newest_valid(checkpoints) == path
    tensors = {name: torch.zeros_like(tensor) for name, tensor in _reference().items()}
    load(path, TrainingState(tensors))
    assert {n: _bits(t) for n, t in tensors.items()} == {n: _bits(t) for n, t in _reference().items()}


def test_a_manifest_cannot_name_files_elsewhere(checkpoints: Path) -> None:
    file = checkpoints / "step-00000200" / "manifest.json"
    text = json.dumps(json.loads(file.read_text())["manifest"]).replace("rank-00000", "../step-00000100/rank-00000")
    checksum = hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps({"sha256": checksum, "manifest": json.loads(text)}))
    with pytest.raises(CheckpointError, match="is not understood"):
        verify(file.parent)


@pytest.mark.parametrize(
    ("change", "complaints"),
    [
        (lambda t: t.update(extra=torch.zeros(1)), ["it lacks: extra"]),
        (lambda t: [t.pop(n) for n in list(t)[:5]], ["only it has: model.mask, ", " and 2 more"]),
        (lambda t: t.update({"model.norm": torch.zeros(6)}), ["other shapes: model.norm (saved [5], wanted [6])"]),
        (lambda t: t.update({"model.norm": torch.zeros(5).half()}), ["model.norm (saved float32, wanted float16)"]),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name_and_left_alone(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], complaints: list[str]
) -> None:
    path = save(tmp_path, TrainingState(_reference()), step=1, metadata={})
    given = {name: torch.zeros_like(tensor) for name, tensor in _reference().items()}
    change(given)
    copies = {name: tensor.clone() for name, tensor in given.items()}
    with pytest.raises(CheckpointError) as caught:
        load(path, TrainingState(given))
    assert all(text in str(caught.value) for text in complaints), str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in given.items())


def _save_on_a_full_disk(rank: int, world_size: int, folder: Path) -> str:
    state = _state(ep=2)
    torch.distributed.barrier()
    if rank == 1:
        # Python ignores SIGXFSZ, so that writing past this many bytes is an error like that of a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as caught:
        save(folder, state, step=200, metadata={})
    return str(caught.value)


def test_a_rank_that_cannot_write_fails_all_ranks_and_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    run_distributed(_save, 2, tmp_path, 2, 100)
    messages = run_distributed(_save_on_a_full_disk, 2, tmp_path)
    assert messages[0] == messages[1]
    assert "rank-00001.safetensors" in messages[0]
    assert "File too large" in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000100"]
    assert newest_valid(tmp_path) == tmp_path / "step-00000100"
    run_distributed(_save, 2, tmp_path, 2, 200)
    assert newest_valid(tmp_path) == tmp_path / "step-00000200"


def _save_unlike(rank: int, world_size: int, folder: Path) -> None:
    save(folder, TrainingState({"w": torch.zeros(2)}, {"lr": 0.1 * (1 + rank)}), step=1, metadata={})


def test_ranks_that_differ_are_found_out(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"rank\(s\) \[1\] bring other"):
        run_distributed(_save_unlike, 2, tmp_path)
    assert newest_valid(tmp_path) is None


def test_a_half_written_folder_of_the_same_step_is_replaced(checkpoints: Path) -> None:
    path = checkpoints / "step-00000200"
    (path / "manifest.json").unlink()
    (path / "rank-00007.safetensors").touch()
    staging = checkpoints / ".step-00000200"
    shutil.copytree(path, staging)
    run_distributed(_save, 2, checkpoints, 2, 200)
    assert newest_valid(checkpoints) == path
    assert sorted(_headers(path)) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000100", "step-00000200"]


def test_pruning_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    paths = [save(tmp_path, TrainingState({"w": torch.ones(3)}), step=s, metadata={}) for s in (5, 10, 100, 1000, 2000)]
    _shorten(paths[3] / "rank-00000.safetensors")
    assert prune(tmp_path, 2) == [paths[1], paths[0]]
    assert sorted(tmp_path.iterdir()) == paths[2:]
    assert prune(tmp_path, 2) == []
    assert newest_valid(tmp_path) == paths[4]
