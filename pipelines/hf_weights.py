"""The tensors of a Hugging Face folder, written by one process and read by as many as train."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moe.config.model import ModelConfig, MtpConfig
from moe.hf import rows_from_hf, shapes_in_hf
from moe.state import TrainingState
from pipelines.checkpoints import held_by_rank
from pipelines.errors import UserError
from pipelines.hf_folder import INDEX, weight_files

MAX_SHARD_BYTES = 5_000_000_000
"""A file holds at most this much, as is usual on the Hugging Face hub (its own default is the same)."""

# Called with the files written so far and in all.
Progress = Callable[[int, int], None]

_FLOATS = {"F64", "F32", "F16", "BF16"}


def write_weights(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    max_bytes: int,
    progress: Progress | None = None,
) -> list[Path]:
    """Write ``tensors`` in ``dtypes`` as safetensors of at most ``max_bytes`` each, with an index if there are several.

    One file at a time is converted, so that memory for one is enough.
    """
    # On meta: the split is decided by sizes alone. Views of one storage would be taken for tied weights otherwise.
    planned = {n: torch.empty(t.shape, dtype=dtypes[n], device="meta") for n, t in tensors.items()}
    split = split_torch_state_dict_into_shards(planned, max_shard_size=max_bytes)
    for done, (file, names) in enumerate(split.filename_to_tensors.items()):
        if progress is not None:
            progress(done, len(split.filename_to_tensors))
        converted = {name: tensors[name].to(dtypes[name]).contiguous() for name in names}
        save_file(converted, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / file for file in split.filename_to_tensors]


class _Stored(Mapping[str, torch.Tensor]):
    """The tensors in some safetensors files, each read when it is looked up."""

    def __init__(self, files: list[Path]) -> None:
        self._file_of: dict[str, Any] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
                names: list[str] = list(file.keys())  # type: ignore[no-untyped-call]
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read: {error}") from error
            self._file_of |= dict.fromkeys(names, file)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype (as safetensors names it), without reading the tensor."""
        view = self._file_of[name].get_slice(name)
        return tuple(view.get_shape()), view.get_dtype()


def check_weights(folder: Path, model: ModelConfig) -> bool:
    """Whether the folder has weights for ``model``, from the headers of its files alone.

    Returns:
        True if it also holds layers of multi-token prediction, which are not read.

    Raises:
        UserError: a tensor is missing, unknown, or has another shape or a dtype that is no float; one line.
    """
    stored = _Stored(weight_files(folder))
    expected = shapes_in_hf(_without_mtp(model))
    # DeepSeek-V3's own files keep them behind the last layer, and so would any number of them.
    ahead = tuple(f"model.layers.{model.num_layers + depth}." for depth in range(9))
    given = {name for name in stored if not name.startswith(ahead)}
    # Width 0: transformers writes them, others need not.
    needed = {name for name, shape in expected.items() if 0 not in shape}
    if missing := sorted(needed - given):
        raise UserError(f"{folder}: {len(missing)} tensors of its config.json's model are missing, first {missing[0]}")
    if unknown := sorted(given - expected.keys()):
        raise UserError(f"{folder}: {len(unknown)} tensors are not of its config.json's model, first {unknown[0]}")
    for name in sorted(given):
        shape, dtype = stored.header(name)
        if shape != expected[name]:
            raise UserError(f"{folder}: {name} is {list(shape)}, but {list(expected[name])} in its config.json's model")
        if dtype not in _FLOATS:
            raise UserError(f"{folder}: {name} is stored as {dtype}; only {', '.join(sorted(_FLOATS))} can be read")
    return len(given) < len(stored)


@torch.no_grad()
def load_weights(state: TrainingState, model: ModelConfig, folder: Path) -> None:
    """Fill weights and expert biases of ``state`` in place from the folder, converted to their dtypes.

    Every rank reads for itself, of the experts only those that it holds. Multi-token prediction stays as it is.

    Raises:
        UserError: `check_weights`.
    """
    check_weights(folder, model)
    held = {
        name.removeprefix("model."): held_by_rank(tensor)
        for name, tensor in state.tensors.items()
        if name.startswith("model.") and not name.startswith("model.mtp.")
    }
    rows = {name: slice(*local.rows) for name, local in held.items() if local.rows[0] < local.rows[1]}
    stored = _Stored(weight_files(folder))
    for name, tensor in rows_from_hf(stored, _without_mtp(model), rows):
        held[name].tensor.copy_(tensor)


def _without_mtp(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"mtp": MtpConfig(depth=0)})
