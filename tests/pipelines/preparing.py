"""The command ``steadymoe prepare`` in this process, text for it, and the config that trains on what it makes."""

import json
import random
from pathlib import Path

from infra.cli import main
from pipelines.config import DataConfig

_WORDS = ["the", "router", "sends", "every", "token", "to", "two", "of", "its", "experts", "and", "counts", "load"]


def texts(number: int = 400, words: int = 60) -> list[str]:
    """Different documents of a few words, always the same."""
    rng = random.Random(7)
    return [" ".join(rng.choices(_WORDS, k=rng.randint(1, words))) + f" {n}\n" for n in range(number)]


def write_lines(path: Path, documents: list[str], field: str = "text") -> Path:
    """Write JSON lines; returns the path."""
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in documents))
    return path


def run_prepare(*arguments: Path | str) -> int:
    """Run the command; returns its exit code."""
    return main(["prepare", *map(str, arguments)])


def trained_on(out: Path, **changes: object) -> DataConfig:
    """The data section of a run that trains on a prepared folder."""
    return DataConfig.model_validate({"corpus": {"kind": "prepared", "path": str(out)}, **changes})
