"""A config as flat names and plain values, the form in which MLflow keeps parameters."""

import json
from typing import Any

from pydantic import BaseModel

Scalar = str | int | float | bool | None


def flatten(config: BaseModel) -> dict[str, Scalar]:
    """Every value of a config by its dotted key, in the order of the classes. A list becomes its JSON text."""
    flat: dict[str, Scalar] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = json.dumps(value) if isinstance(value, list) else value

    visit("", config.model_dump(mode="json"))
    return flat
