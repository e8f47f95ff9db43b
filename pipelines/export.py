"""A run's model as a Hugging Face folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load without further code.

Only weights, architecture and tokenizer go there. What shapes training alone (optimizer, schedule, attention within
documents) leaves no trace in it: the folder attends to all earlier tokens, whatever the run's data settings were.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError

from moe.config.hf import hf_config, refuse_inexpressible
from moe.hf import to_hf
from pipelines.checkpoint_manifest import Manifest, checkpoint_folders, step_name, step_of, verify
from pipelines.checkpoint_standing import newest_valid
from pipelines.checkpoints import load_whole
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.hf_folder import CONFIG, GENERATION_CONFIG
from pipelines.hf_tokenizer import training_tokenizer_json, write_tokenizer
from pipelines.hf_weights import MAX_SHARD_BYTES, write_weights
from pipelines.loading import load_config
from pipelines.paths import made_folder
from pipelines.prepare import tokenizer_of
from pipelines.run_folder import RunFolder
from pipelines.tokenizer import Tokenizer

Dtype = Literal["fp32", "bf16"]
_EXPERT_BIAS = "e_score_correction_bias"
_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(
    run: RunFolder, to: Path, step: int | None = None, dtype: Dtype = "fp32", max_shard_bytes: int = MAX_SHARD_BYTES
) -> str:
    """Write the model of a checkpoint to ``to``, which appears complete, and say what was written and how to load it.

    One process without Ray or a process group, whatever ranks saved the checkpoint; all weights in memory once.

    Args:
        run: the run.
        to: a folder that does not exist or is empty.
        step: the checkpoint after so many steps; None takes the newest valid one.
        dtype: of the weights. Expert biases stay fp32: their steps of 1e-3 would vanish in bf16.
        max_shard_bytes: weights beyond that are divided among files.

    Raises:
        UserError: the model cannot be expressed, there is no such checkpoint, it or the tokenizer's file was altered,
            or the folder cannot be written. Nothing is left of it then.
    """
    to = to.resolve()
    name = run.info.name
    config = load_config([str(run.config)])
    try:
        refuse_inexpressible(config.model)
    except ValueError as error:
        raise UserError(f"run {name} cannot be exported: {error}") from None
    _refuse_occupied(to)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking the checkpoint", total=None)
        checkpoint = _checkpoint(run, step)
        manifest = verify(checkpoint, checksums=False)
        tokenizer = _tokenizer(config, manifest, name)
        tensors = to_hf(load_whole(checkpoint, "model."), config.model)
        dtypes = {n: torch.float32 if n.endswith(_EXPERT_BIAS) else _DTYPES[dtype] for n in tensors}
        with _appearing(to) as folder:
            content = training_tokenizer_json(tokenizer)
            write_tokenizer(folder, content, tokenizer.document_token, config.data.sequence_length)
            _write_configs(folder, config, tokenizer.document_id, dtype)
            files = write_weights(
                folder,
                tensors,
                dtypes,
                max_shard_bytes,
                lambda done, total: bar.update(task, description=f"writing {to}", completed=done, total=total),
            )
            for file in files:
                shutil.copymode(folder / CONFIG, file)  # safetensors makes files that their owner alone can read
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(_EXPERT_BIAS))
    return f"""\
Wrote run {name} after {manifest.step:,} steps to {to}:
{parameters:,} parameters as {dtype} in {_counted(files)}, with the tokenizer.{_left_out(config)}
Load it with transformers:
  from transformers import AutoModelForCausalLM, AutoTokenizer
  tokenizer, model = (auto.from_pretrained({str(to)!r}) for auto in (AutoTokenizer, AutoModelForCausalLM))
  ids = model.generate(**tokenizer("import ", return_tensors="pt"), max_new_tokens=40)
  print(tokenizer.decode(ids[0]))"""


def _counted(files: list[Path]) -> str:
    return f"{len(files)} file{'s' if len(files) > 1 else ''}"


def _left_out(config: RunConfig) -> str:
    return "\nMulti-token prediction has no place in this format and was left out." if config.model.mtp.depth else ""


def _refuse_occupied(to: Path) -> None:
    try:
        occupied = any(to.iterdir()) if to.is_dir() else to.exists()
    except OSError as error:
        raise UserError(f"--to {to}: cannot be read: {error.strerror}") from None
    if occupied:
        raise UserError(f"--to {to}: exists{' and is not empty' if to.is_dir() else ''}; name a new folder")


def _checkpoint(run: RunFolder, step: int | None) -> Path:
    """The checkpoint that is asked for, every byte of it checked."""
    saved = checkpoint_folders(run.checkpoints)
    name = run.info.name
    if not saved:
        raise UserError(f"run {name} has no checkpoint in {run.checkpoints} yet")
    if step is None:
        newest = newest_valid(run.checkpoints)
        if newest is None:
            raise UserError(f"run {name} has no checkpoint that is whole in {run.checkpoints}")
        return newest
    path = run.checkpoints / step_name(step)
    if path not in saved:
        steps = ", ".join(str(step_of(found)) for found in saved)
        raise UserError(f"--step {step}: run {name} has no checkpoint of this step; it has {steps}")
    verify(path)
    return path


def _tokenizer(config: RunConfig, manifest: Manifest, run: str) -> Tokenizer:
    tokenizer = tokenizer_of(config.data)
    # Checkpoints of before this was recorded say nothing.
    trained_with = manifest.metadata.get("tokenizer_sha256", tokenizer.sha256)
    if tokenizer.sha256 != trained_with:
        raise UserError(
            f"data.tokenizer: {tokenizer.name} was altered since run {run} was trained with it; "
            f"put back the file whose SHA-256 is {trained_with}"
        )
    return tokenizer


def _write_configs(folder: Path, config: RunConfig, document_id: int, dtype: Dtype) -> None:
    # A text begins after the token that ended the one before, so it is what generation starts and stops with.
    tokens = {"bos_token_id": document_id, "eos_token_id": document_id, "pad_token_id": document_id}
    model = {
        **hf_config(config.model),
        **tokens,
        "max_position_embeddings": config.data.sequence_length,
        "dtype": str(_DTYPES[dtype]).removeprefix("torch."),
    }
    for name, content in ((CONFIG, model), (GENERATION_CONFIG, tokens)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _appearing(to: Path) -> Iterator[Path]:
    """A hidden folder beside ``to`` that takes its name in the end, and is gone with all new ones if anything fails."""
    staging = to.with_name(f".{to.name}.{uuid.uuid4().hex}")
    try:
        with made_folder(to.parent):
            staging.mkdir()
            try:
                yield staging
                os.rename(staging, to)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"--to {to}: cannot be written: {reason}") from error
