"""What the docs promise is there, and what is there has its row."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipelines.config import RunConfig
from pipelines.schema import by_kind, section_classes

TECHNIQUES = (Path(__file__).parents[1] / "docs" / "techniques.md").read_text(encoding="utf-8")
FIRST_COLUMNS = [line.split("|")[1] for line in TECHNIQUES.splitlines() if line.startswith("| `")]


def kinds(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    """Every (dotted key of a union, kind) of the tree."""
    for name, field in section.model_fields.items():
        classes = section_classes(field)
        dotted = f"{path}.{name}" if path else name
        for kind in by_kind(classes):
            yield dotted, kind
        for chosen in classes:
            yield from kinds(chosen, dotted)


def test_every_kind_of_a_technique_has_a_row() -> None:
    families = (
        "stability.",
        "model.activation",
        "model.residual",
        "model.moe.selection",
        "schedule.decay",
        "schedule",
        "optimizer",
        "precision.fp8",
    )
    # The shape of a stage's learning rate is in the row of stages.
    wanted = {
        f"`{key}.kind={kind}`" for key, kind in kinds(RunConfig) if key.startswith(families) and "stages" not in key
    }
    assert len(wanted) > 20
    documented = {word for column in FIRST_COLUMNS for word in re.findall(r"`[^`]+`", column)}
    assert wanted - documented == set()


def _field(dotted: str) -> Any:
    """The field that a key of the tree names, in any of the classes that may be there."""
    classes: tuple[type[BaseModel], ...] = (RunConfig,)
    field = None
    for part in dotted.split("."):
        found = [c.model_fields[part] for c in classes if part in c.model_fields]
        if not found:
            return None
        field = found[0]
        classes = tuple(inner for f in found for inner in section_classes(f))
    return field


def test_every_key_of_a_row_is_one_of_the_config() -> None:
    keys = {
        key
        for column in FIRST_COLUMNS
        for key in re.findall(r"`([a-z_]+(?:\.[a-z0-9_]+)+)[=.{`]?", column)
        if not key.startswith("moe/")
    }
    assert len(keys) > 15
    assert {key for key in keys if _field(key.rstrip(".")) is None} == set()
