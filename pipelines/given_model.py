"""The model section of a run that starts from given weights: the weights decide, and what a user wrote must agree.

Presets are made for training from the start: what they say about the shape gives way. What a user's own file or
``--set`` says is his wish, and is refused where the weights are otherwise. The sections that weights say nothing about
(multi-token prediction, initial spread) come from the config as ever.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe.config.hf import NOT_IN_WEIGHTS
from pipelines.errors import UserError
from pipelines.hf_folder import CONFIG, read_model
from pipelines.yaml_text import Path as KeyPath

Tree = dict[str, Any]


def given_model(folder: Path, wishes: Mapping[str, Any], origins: Mapping[KeyPath, str]) -> Tree:
    """What the weights in ``folder`` say of the model section, once ``wishes`` are found to agree with it.

    Args:
        folder: the weights.
        wishes: what the user's files and ``--set`` say in the model section; unknown keys are left to validation.
        origins: where the value of a key of the whole tree was set.

    Raises:
        UserError: the folder is wrong, or keys disagree; one line a key.
    """
    given = read_model(folder).model_dump(mode="json", exclude=set(NOT_IN_WEIGHTS))
    lines = []
    for path, wished in _leaves(wishes, ()):
        known, actual = _at(given, path)
        if known and wished != actual:
            key = ("model", *path)
            by = f" (set by {origins[key]})" if key in origins else ""
            lines.append(f"{'.'.join(key)}: {wished}{by} is not what {folder / CONFIG} says, {actual}; leave it out")
    if lines:
        raise UserError("\n".join(lines))
    return given


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _at(tree: Tree, path: tuple[str, ...]) -> tuple[bool, Any]:
    """Whether there is such a key, and its value."""
    value: Any = tree
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return False, None
        value = value[key]
    return True, value
