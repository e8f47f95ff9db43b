"""Saves and restores training state on any number of ranks.

Written straight onto safetensors, although torch's distributed checkpoint has a storage for that format: that one
leaves no record of what belongs to a checkpoint (it loads every safetensors file it finds in the folder), has no
checksums, converts a tensor of another dtype silently, and holds a rank's shard twice more in memory while it writes
(470 MB for 240 MB). Of its work, only the choice of who writes what would remain: `_choose_writers`.

A checkpoint is assembled in a hidden folder beside its place and takes its name when all of it is on the disk, the
manifest last. So a folder with a manifest is whole, and nothing that exists is touched before that.

Every rank decides alike: an error of any rank is raised on all.
"""

import hashlib
import json
import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moe.state import JSON, TrainingState
from pipelines.checkpoint_manifest import (
    CheckpointError,
    FileRecord,
    Manifest,
    Piece,
    TensorRecord,
    rows,
    sha256_of,
    step_name,
    verify,
    write_manifest,
)
from pipelines.checkpoint_standing import newest_valid, prune, take_place
from pipelines.errors import UserError
from pipelines.rehearsal import refuse_if_full

__all__ = [
    "CheckpointError",
    "Held",
    "Restored",
    "held_by_rank",
    "load",
    "load_whole",
    "newest_valid",
    "prune",
    "save",
    "verify",
]

T = TypeVar("T")
Rows = tuple[int, int]
"""Rows [start, stop) of a tensor."""


class Restored(TypedDict):
    """What a checkpoint holds besides tensors."""

    step: int
    timeline: int
    scalars: dict[str, Any]
    metadata: dict[str, Any]


def save(folder: Path, state: TrainingState, *, step: int, metadata: Mapping[str, JSON], timeline: int = 0) -> Path:
    """Write ``folder/step-00000100`` (for step 100) and return its path. Collective.

    Each rank writes the rows that it holds; what several hold is written once, spread over them by size. A checkpoint
    of the same step is replaced; a pinned one is kept under another name. ``metadata`` must be equal on every rank,
    like the scalars. ``timeline`` counts how often the run went back to an older checkpoint.

    Raises, on every rank:
        CheckpointError: a file cannot be written. Nothing is left of the new checkpoint; older ones are as they were.
        RuntimeError: the ranks' states do not belong together, or a tensor is sharded in a way that is not supported.
    """
    path = folder / step_name(step)
    staging = folder / f".{path.name}"
    try:
        _on_every_rank(lambda: _clear(folder, staging))
        locals_ = _on_every_rank(lambda: {name: held_by_rank(state.tensors[name]) for name in sorted(state.tensors)})
        writers = _plan(state, locals_, [step, dict(state.scalars), dict(metadata)])
        record = _on_every_rank(lambda: _write_own(staging, locals_, writers))
        records = _gather(record)
        manifest = _manifest(state, step, timeline, metadata, writers, records)
        _on_every_rank(lambda: _commit(staging, path, manifest))
    except Exception:
        if _rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    return path


def load(path: Path, state: TrainingState, fresh: tuple[str, ...] = ()) -> Restored:
    """Fill the tensors of ``state`` in place from the checkpoint at ``path`` and return the rest of it. Collective.

    Ranks, expert parallelism and sharding may differ from those of saving; each rank reads just the rows it holds.
    Only the sizes of files are checked here: `newest_valid` and `verify` compare checksums. Tensors whose names begin
    with one of ``fresh`` are left as they are, whether the checkpoint has them or not.

    Raises, on every rank:
        CheckpointError: it is damaged or incomplete, or its tensors are not those of ``state`` by name, shape and
            dtype (then nothing has been written to ``state``).
    """

    wanted = {name: tensor for name, tensor in state.tensors.items() if not name.startswith(fresh)}

    def read() -> Manifest:
        manifest = verify(path, checksums=False)
        saved = {name: record for name, record in manifest.tensors.items() if not name.startswith(fresh)}
        _check_fit(path, saved, wanted)
        return manifest

    manifest = _on_every_rank(read)
    _on_every_rank(lambda: _fill(path, manifest, wanted))
    return {
        "step": manifest.step,
        "timeline": manifest.timeline,
        "scalars": manifest.scalars,
        "metadata": manifest.metadata,
    }


def load_whole(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint at ``path`` whose names begin with ``prefix``, whole, by the rest of their names.

    For one process, whatever ranks saved it; a tensor that lies in one piece is mapped, not read.

    Raises:
        CheckpointError: it is damaged or incomplete.
    """
    manifest = verify(path, checksums=False)
    records = {name: record for name, record in manifest.tensors.items() if name.startswith(prefix)}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in records}
    with ExitStack() as opened:
        files: dict[str, Any] = {}
        for name, record in records.items():
            for piece in record.pieces:
                with _naming(path / piece.file):
                    if piece.file not in files:
                        files[piece.file] = opened.enter_context(safe_open(path / piece.file, framework="pt"))
                    found[name].append(files[piece.file].get_tensor(name))
    return {name.removeprefix(prefix): _joined(path, name, records[name], pieces) for name, pieces in found.items()}


def _joined(path: Path, name: str, record: TensorRecord, pieces: list[torch.Tensor]) -> torch.Tensor:
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if tuple(whole.shape) != record.shape or _dtype(whole) != record.dtype:
        raise CheckpointError(f"{path} holds another {name} than its manifest says")
    return whole


class Held(NamedTuple):
    """The part of a tensor that this rank holds: rows [start, stop)."""

    tensor: torch.Tensor
    rows: Rows


Writers = dict[str, list[tuple[Rows, int]]]
"""Of each tensor, in order of rows, which rank writes which."""


def held_by_rank(tensor: torch.Tensor) -> Held:
    """What this rank holds of a tensor of the state, sharing its storage. TypeError if it is not sharded by rows."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return Held(tensor.detach(), (0, rows(tensor.shape)))
    from torch.distributed.tensor import DTensor, Replicate, Shard  # 0.6 s that a single process need not spend

    if not isinstance(tensor, DTensor):
        raise TypeError(f"a checkpoint holds tensors and DTensors, not {type(tensor).__name__}")
    if not all(isinstance(p, Replicate) or (type(p) is Shard and p.dim == 0) for p in tensor.placements):
        raise TypeError(f"only sharding by rows can be saved, not {tensor.placements}")
    with torch.no_grad():
        local = tensor.to_local().detach()
    (chunk,) = tensor.__create_chunk_list__()  # torch's protocol for checkpoints; knows about uneven shards
    start = chunk.offsets[0] if chunk.offsets else 0
    return Held(local, (start, start + rows(local.shape)))


def _plan(state: TrainingState, locals_: dict[str, Held], common: list[Any]) -> Writers:
    """Who writes what: the same answer on every rank, which is also where unlike ranks are found out."""
    names = list(locals_)
    common = [*common, [(name, _dtype(state.tensors[name]), list(state.tensors[name].shape)) for name in names]]
    digest = _on_every_rank(lambda: hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest())
    gathered = _gather((digest, [locals_[name].rows for name in names]))
    if unlike := [rank for rank, (other, _) in enumerate(gathered) if other != gathered[0][0]]:
        raise RuntimeError(f"rank(s) {unlike} bring other tensors, scalars, metadata or another step than rank 0")
    row_bytes = {name: state.tensors[name].nbytes // max(1, rows(state.tensors[name].shape)) for name in names}
    return _choose_writers(row_bytes, [dict(zip(names, ranges, strict=True)) for _, ranges in gathered])


def _choose_writers(row_bytes: dict[str, int], rows_of_ranks: list[dict[str, Rows]]) -> Writers:
    """Give each piece to that of its holders that has the least to write so far.

    Pieces with few holders first, since they leave no choice, then the largest first.
    """
    holders: dict[tuple[str, Rows], list[int]] = {}
    for rank, rows_of in enumerate(rows_of_ranks):
        for name, (start, stop) in rows_of.items():
            if stop > start:
                holders.setdefault((name, (start, stop)), []).append(rank)

    def size(piece: tuple[str, Rows]) -> int:
        name, (start, stop) = piece
        return (stop - start) * row_bytes[name]

    load = [0] * len(rows_of_ranks)
    writers: Writers = {name: [] for name in row_bytes}
    for piece in sorted(holders, key=lambda piece: (len(holders[piece]), -size(piece), piece)):
        writer = min(holders[piece], key=lambda rank: load[rank])
        load[writer] += size(piece)
        writers[piece[0]].append((piece[1], writer))
    return {name: sorted(pieces) for name, pieces in writers.items()}


def _clear(folder: Path, staging: Path) -> None:
    """Make room to write in. Also removes what a killed process left: a folder has one writer."""
    if _rank() == 0:
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover)
        staging.mkdir(parents=True)


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _write_own(staging: Path, locals_: dict[str, Held], writers: Writers) -> FileRecord | None:
    mine = {
        name: locals_[name].tensor.contiguous()
        for name, pieces in writers.items()
        if (locals_[name].rows, _rank()) in pieces
    }
    if not mine:
        return None
    path = staging / _file_name(_rank())
    refuse_if_full(staging.parent)
    with _naming(path):
        save_file(mine, path, metadata={"format": "pt"})
    _sync(path)
    return FileRecord(size=path.stat().st_size, sha256=sha256_of(path))


def _manifest(
    state: TrainingState,
    step: int,
    timeline: int,
    metadata: Mapping[str, JSON],
    writers: Writers,
    records: list[FileRecord | None],
) -> Manifest:
    tensors = {
        name: TensorRecord(
            dtype=_dtype(state.tensors[name]),
            shape=tuple(state.tensors[name].shape),
            pieces=tuple(Piece(file=_file_name(r), start=start, stop=stop) for (start, stop), r in pieces),
        )
        for name, pieces in writers.items()
    }
    return Manifest(
        step=step,
        timeline=timeline,
        files={_file_name(rank): record for rank, record in enumerate(records) if record is not None},
        tensors=tensors,
        scalars=dict(state.scalars),
        metadata=dict(metadata),
    )


def _commit(staging: Path, path: Path, manifest: Manifest) -> None:
    """Write the manifest and give the folder its name, on rank 0."""
    if _rank() != 0:
        return
    write_manifest(staging, manifest)
    _sync(staging)
    replaced = take_place(staging, path)
    _sync(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)  # what is left of it, the next save clears


def _check_fit(path: Path, saved: Mapping[str, TensorRecord], given: Mapping[str, torch.Tensor]) -> None:
    both = sorted(saved.keys() & given.keys())
    shapes = [n for n in both if saved[n].shape != tuple(given[n].shape)]
    dtypes = [n for n in both if saved[n].dtype != _dtype(given[n])]
    complaints = {
        "it lacks": sorted(given.keys() - saved.keys()),
        "only it has": sorted(saved.keys() - given.keys()),
        "other shapes": [f"{n} (saved {list(saved[n].shape)}, wanted {list(given[n].shape)})" for n in shapes],
        "other dtypes": [f"{n} (saved {saved[n].dtype}, wanted {_dtype(given[n])})" for n in dtypes],
    }
    if found := "; ".join(f"{what}: {_first_few(names)}" for what, names in complaints.items() if names):
        raise CheckpointError(f"checkpoint {path} does not fit the model and optimizer of this config: {found}")


def _first_few(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _fill(path: Path, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
    wanted: dict[str, list[tuple[str, Piece, Held]]] = {}
    for name, tensor in tensors.items():
        local = held_by_rank(tensor)
        for piece in manifest.tensors[name].pieces:
            if piece.start < local.rows[1] and local.rows[0] < piece.stop:
                wanted.setdefault(piece.file, []).append((name, piece, local))
    for file, reads in wanted.items():
        with _naming(path / file), safe_open(path / file, framework="pt") as stored:
            for name, piece, local in reads:
                target, source = _common_rows(stored, name, piece, local)
                if source.shape != target.shape or source.dtype != target.dtype:
                    raise CheckpointError(f"{path / file} holds another {name} than its manifest says")
                target.copy_(source)


def _common_rows(stored: Any, name: str, piece: Piece, local: Held) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the rows that are both in ``local`` and in ``piece``, where they go and what they hold."""
    if local.rows == (piece.start, piece.stop):
        return local.tensor, stored.get_tensor(name)  # a tensor of no dimension always comes here
    start, stop = max(piece.start, local.rows[0]), min(piece.stop, local.rows[1])
    target = local.tensor[start - local.rows[0] : stop - local.rows[0]]
    return target, stored.get_slice(name)[start - piece.start : stop - piece.start]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file it is that safetensors cannot write or read."""
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gather(value: T) -> list[T]:
    """The value of every rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _on_every_rank(action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; if it fails on any, raise the same error on all.

    What the outside world or the user can cause becomes a CheckpointError, anything else a RuntimeError with the
    traceback of the rank where it happened.
    """
    cause: Exception | None = None
    complaint: tuple[bool, str] | None = None
    try:
        result = action()
    except (OSError, UserError) as error:
        cause, complaint = error, (True, str(error))
    except Exception as error:  # noqa: BLE001  (raised below, on all ranks; not told, the others would wait for this one)
        cause, complaint = error, (False, traceback.format_exc())
    complaints = {rank: told for rank, told in enumerate(_gather(complaint)) if told is not None}
    if not complaints:
        return result
    reasons = list(dict.fromkeys(text for _, text in complaints.values()))
    message = reasons[0] if len(reasons) == 1 else _first_few([f"rank {r}: {t}" for r, (_, t) in complaints.items()])
    expected = all(of_the_world for of_the_world, _ in complaints.values())
    raise (CheckpointError if expected else RuntimeError)(message) from cause
