"""A folder of weights in Hugging Face's layout: which files it holds and which model it describes. Imports no torch.

Only JSON and safetensors are ever opened, so a stranger's folder runs no code: pickles (``*.bin``) are refused, and the
Python files that ``auto_map`` names are not looked at.
"""

import json
import re
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from moe.config.hf import model_from_hf
from moe.config.model import ModelConfig
from pipelines.errors import UserError

CONFIG: Final = "config.json"
GENERATION_CONFIG: Final = "generation_config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"

_FILE_NAME: Final = re.compile(r"[\w.-]+\.safetensors")
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_model(folder: Path) -> ModelConfig:
    """The model that a folder's ``config.json`` describes.

    Raises:
        UserError: there is no such folder or file, or this model is another; one line naming file and keys.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of weights (they are read from disk, never downloaded)")
    content = read_object(folder / CONFIG)
    try:
        return model_from_hf(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{folder / CONFIG}: {key or 'model'}: {first['msg']}") from None
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, those that its index names or else the only one.

    Raises:
        UserError: there are none, or the index is wrong.
    """
    if (folder / INDEX).is_file():
        where = read_object(folder / INDEX).get("weight_map")
        names = sorted({str(name) for name in where.values()}) if isinstance(where, dict) else []
        # A name, never a path: an index must not point out of its folder.
        wrong = [name for name in names if not _FILE_NAME.fullmatch(name)]
        if wrong or not names:
            such = f", not {wrong[0]}" if wrong else ""
            raise UserError(f"{folder / INDEX}: weight_map should name safetensors files in this folder{such}")
        files = [folder / name for name in names]
    else:
        files = [folder / WEIGHTS]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing{_pickles_found(folder)}")
    return files


def read_object(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. UserError if it cannot be read or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: should hold a JSON object")
    return content


def _pickles_found(folder: Path) -> str:
    found = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if not found:
        return ""
    return f"; {found[0]} is a pickle, which can run code when it is read: convert it to safetensors first"
