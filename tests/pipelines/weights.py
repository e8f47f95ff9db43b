"""A small finished run without Ray or MLflow, and folders of weights, for the tests of export and --init-from."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipelines.loading import dump_config
from pipelines.run_folder import RunFolder, RunInfo
from tests.distributed import run_distributed
from tests.pipelines.small_run import run_loop, small_config

VOCABULARY = 257


def finished_run(home: Path, name: str, *settings: str, world: int = 1) -> RunFolder:
    """Train the small run in ``home``, which must be STEADYMOE_HOME, and leave what the driver leaves in its folder."""
    folder = RunFolder(home / "runs" / name)
    config = small_config(f"parallel.workers={world}", *settings)
    model = config.model.model_copy(update={"vocab_size": VOCABULARY})
    folder.path.mkdir(parents=True)
    folder.config.write_text(dump_config(config.model_copy(update={"model": model})), encoding="utf-8")
    folder.write_info(RunInfo(name, name, "steadymoe", "1", "2026-01-01T00:00:00+00:00", "sqlite://"))
    if world == 1:
        run_loop(0, 1, folder.path, settings)
    else:
        run_distributed(run_loop, world, folder.path, settings)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors; dots in names are written as two underscores; None removes one."""
    path = folder / "model.safetensors"
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    kept = {name: tensor for name, tensor in (load_file(path) | named).items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})
