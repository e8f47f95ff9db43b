"""The files of a checkpoint: its manifest, and whether it is whole. Imports no torch.

A run's checkpoints lie side by side, ``step-00000100/`` and so on, the number being the steps done. Each holds
safetensors files and ``manifest.json``, which says what they must contain. Files that no manifest names are ignored.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from pipelines.errors import UserError

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8,})")

# A name, never a path: a stranger's manifest must not point out of its folder.
FileName = Annotated[str, Field(pattern=r"^[\w.-]+\.safetensors$")]


class CheckpointError(UserError):
    """A checkpoint cannot be written, or is damaged, or does not fit; one line names the file or tensors."""


class _Record(BaseModel):
    # Keys that a later version adds are read over.
    model_config = ConfigDict(frozen=True, extra="ignore")


class FileRecord(_Record):
    """What a file must be."""

    size: NonNegativeInt
    """Bytes."""
    sha256: str


class Piece(_Record):
    """Rows ``[start, stop)`` (dimension 0) of a tensor, stored in a file under the tensor's name."""

    file: FileName
    start: NonNegativeInt
    stop: NonNegativeInt


class TensorRecord(_Record):
    """A whole tensor, whatever ranks it was spread over."""

    dtype: str
    """torch's name, for example ``bfloat16``."""
    shape: tuple[NonNegativeInt, ...]
    pieces: tuple[Piece, ...]
    """In order of rows, without gap or overlap. A tensor of no dimension is one row; one of no rows has no piece."""

    @model_validator(mode="after")
    def _pieces_make_the_tensor(self) -> "TensorRecord":
        row = 0
        for piece in self.pieces:
            if piece.start != row or piece.stop <= row:
                raise ValueError(f"rows {row} to {piece.start} are missing or double")
            row = piece.stop
        if row != rows(self.shape):
            raise ValueError(f"{row} rows are stored, but the shape is {list(self.shape)}")
        return self


class Manifest(_Record):
    """Everything about a checkpoint that is not tensor data."""

    format: Literal[1] = 1
    step: NonNegativeInt
    timeline: NonNegativeInt = 0
    """How often the run had gone back to an older checkpoint when this one was saved."""
    files: dict[FileName, FileRecord]
    tensors: dict[str, TensorRecord]
    scalars: dict[str, Any]
    metadata: dict[str, Any]

    @model_validator(mode="after")
    def _pieces_lie_in_known_files(self) -> "Manifest":
        unknown = {piece.file for tensor in self.tensors.values() for piece in tensor.pieces} - self.files.keys()
        if unknown:
            raise ValueError(f"pieces lie in files that are not listed: {sorted(unknown)[:3]}")
        return self


def rows(shape: tuple[int, ...]) -> int:
    """Length of dimension 0; a tensor of no dimension counts as one row."""
    return shape[0] if shape else 1


def step_name(step: int) -> str:
    """Name of the folder of a checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Inverse of `step_name`, whatever state the checkpoint is in."""
    return int(path.name.rpartition("-")[2])


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest`` into ``folder``, together with its own checksum, and wait until it is on the disk."""
    content = manifest.model_dump()  # its JSON mode would write infinity as null
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"sha256": _checksum(content), "manifest": content}, file)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at ``path``. Raises CheckpointError if it is missing or damaged."""
    try:
        document = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is no checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("sha256") != _checksum(document.get("manifest")):
        raise CheckpointError(f"{path / MANIFEST} is damaged: it does not match its own checksum")
    try:
        return Manifest.model_validate(document["manifest"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path / MANIFEST} is not understood: {where}: {first['msg']}") from error


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify(path: Path, *, checksums: bool = True) -> Manifest:
    """The manifest of the checkpoint at ``path``, once its files are found to be as that says.

    Without ``checksums`` only sizes are compared, which finds a truncated file but not a flipped bit; with them every
    byte is read, about 1.2 GB/s.

    Raises:
        CheckpointError: what is wrong, for the first file that is.
    """
    manifest = read_manifest(path)
    for name, record in manifest.files.items():
        try:
            size = (path / name).stat().st_size
            if size != record.size:
                raise CheckpointError(f"{path / name} has {size} bytes where {record.size} were written")
            if checksums and sha256_of(path / name) != record.sha256:
                raise CheckpointError(f"{path / name} is damaged: its checksum does not match")
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error.strerror}") from error
    return manifest


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_folders(folder: Path) -> list[Path]:
    """Folders in ``folder`` that are named like a checkpoint, by step."""
    if not folder.is_dir():
        return []
    steps = {int(match[1]): path for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def whole_checkpoints(folder: Path) -> dict[str, Path]:
    """Checkpoints in ``folder`` by name, oldest first. Cheap: that there is a manifest is all that is looked at."""
    return {path.name: path for path in checkpoint_folders(folder) if (path / MANIFEST).exists()}
