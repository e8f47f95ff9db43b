"""What a trial leaves of its run for a study: the course of a few metrics, the last validation, and how it ended."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipelines.run_folder import write_whole

_ENCODE = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_DIGITS = 6


@dataclass(frozen=True)
class Series:
    """One run, step by step. What is not finite is NaN here and null in the file; so is what a step did not have."""

    outcome: str
    """How it ended, in the words of `pipelines.outcome`."""
    steps: int
    """Optimizer steps that its schedule has; a run that diverged did fewer."""
    train: Mapping[str, Sequence[float]]
    """By the trainer's names, one value for every step done, from step 1: ``train/loss``, ``train/grad_norm`` (before
    clipping), ``train/step_seconds``, ``moe/max_vio_batch`` if there are experts, ``moe/real_experts_mean`` if a token
    may have more or fewer, ``train/clipped`` (0 or 1) if the run clips."""
    validation: Mapping[str, float]
    """The last validation by the trainer's names; empty if the run diverged before its first."""

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.train.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"every series should have one value for each step done, and they have {lengths}")

    @property
    def step_seconds(self) -> float:
        """The median time of a step."""
        return float(np.nanmedian(self.train["train/step_seconds"]))

    def write(self, path: Path) -> None:
        """Write it as JSON, with 6 significant digits. The file is whole or not there."""
        content = {
            "outcome": self.outcome,
            "steps": self.steps,
            "train": {name: [_to_json(value) for value in values] for name, values in self.train.items()},
            "validation": {name: _to_json(value) for name, value in self.validation.items()},
        }
        write_whole(path, _ENCODE(content) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Inverse of `write`."""
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            outcome=content["outcome"],
            steps=content["steps"],
            train={name: [_from_json(value) for value in values] for name, values in content["train"].items()},
            validation={name: _from_json(value) for name, value in content["validation"].items()},
        )


def _to_json(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def _from_json(value: float | None) -> float:
    return math.nan if value is None else float(value)
