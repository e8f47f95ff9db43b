"""A study that is right, as the tree of its file, for tests to change."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.yaml_text import dump

LEFT = {"arm": "a", "measure": "val_loss"}
RIGHT = {"arm": "b", "measure": "val_loss"}
STUDY: dict[str, Any] = {
    "title": "a study",
    "question": "which?",
    "base": ["micro"],
    "arms": {"a": {"says": "first"}, "b": {"says": "second", "config": {"optimizer": {"weight_decay": 0.2}}}},
    "shown": ["val_loss"],
    "claims": [{"name": "c", "says": "so", "conditions": [{"left": LEFT, "relation": "below", "right": RIGHT}]}],
}
GRID = {"key": "optimizer.lr", "values": [0.001, 0.01]}


def changed(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The study with a value, by the dotted path of its key, in place of another; None takes the key out."""
    tree = copy.deepcopy(STUDY)
    for dotted, value in changes.items():
        *above, last = (int(part) if part.isdigit() else part for part in dotted.split("."))
        place: Any = tree
        for part in above:
            place = place[part] if isinstance(part, int) else place.setdefault(part, {})
        if value is None:
            del place[last]
        else:
            place[last] = copy.deepcopy(value)
    return tree


def write_study(folder: Path, changes: Mapping[str, Any], name: str = "mine.yaml") -> str:
    """The path of a study's file."""
    path = folder / name
    path.write_text(dump(changed(changes)), encoding="utf-8")
    return str(path)
