"""From presets, YAML files and ``--set`` to a validated RunConfig.

Layers stack and the later wins, mapping by mapping: ``small recipes/x my.yaml --set optimizer.lr=1e-3``. A layer that
changes the ``kind`` of a technique takes nothing over from the kind that it replaces.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from moe.config.hf import NOT_IN_WEIGHTS
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.given_model import given_model
from pipelines.problems import explain, nearest
from pipelines.schema import KIND, by_kind, default_kind, section_classes
from pipelines.yaml_text import Document, dump, parse_document, parse_value
from pipelines.yaml_text import Path as KeyPath

PRESETS = Path(__file__).parent / "presets"
FILE_SUFFIX = ".yaml"
_PLURALS = {"preset": "Presets", "study": "Studies", "sweep": "Sweeps"}
MODEL = "model"
SETTINGS = "--set"
"""What messages call the layer of settings."""

Tree = dict[str, Any]


def load_config(
    layers: Sequence[str],
    settings: Sequence[str] = (),
    weights: Path | None = None,
    trees: Mapping[str, Tree] | None = None,
) -> RunConfig:
    """Build the config of a run.

    Args:
        layers: names of presets, or paths of files that end in ``.yaml``; a later one wins over an earlier one.
        trees: further layers on top of those, by what messages are to call them.
        settings: ``key=value`` each, as ``--set`` takes them; together they are the last layer.
        weights: folder of weights to start from, which decides the model's shape: `pipelines.given_model`.

    Raises:
        UserError: an unknown preset, an unreadable file, wrong weights, or a config that does not hold; one line
            a problem.
    """
    tree: Tree = {}
    wishes: Tree = {}
    origins: dict[KeyPath, str] = {}
    for layer in layers:
        name, document = read_document(layer, PRESETS, "preset")
        _stack(tree, document.tree)
        if layer.endswith(FILE_SUFFIX):
            _overlay(wishes, document.tree)
        origins |= {path: f"{name}, line {line}" for path, line in document.lines.items()}
    chosen = settings_tree(settings)
    for name, layer_tree in [*(trees or {}).items(), (SETTINGS, chosen)]:
        _stack(tree, copy.deepcopy(layer_tree))
        origins |= dict.fromkeys(_paths(layer_tree, ()), name)
    if weights is not None:
        _overlay(wishes, chosen)
        _take_model(tree, wishes, weights, origins)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, RunConfig, origins)) from None


def _take_model(tree: Tree, wishes: Tree, weights: Path, origins: dict[KeyPath, str]) -> None:
    """Put the model of ``weights`` into ``tree``, in place of what presets say of it."""
    model, wished = tree.get(MODEL, {}), wishes.get(MODEL, {})
    if not isinstance(model, dict) or not isinstance(wished, dict):
        return  # validation complains
    open_to = {*NOT_IN_WEIGHTS, *(key for key in ("vocab_size",) if wished.get(key) is None)}
    shape = {key: value for key, value in wished.items() if key not in open_to}
    given = given_model(weights, shape, origins)
    _overlay(given, shape)  # they agree, so this adds but what validation is to refuse
    tree[MODEL] = given | {key: model[key] for key in NOT_IN_WEIGHTS if key in model}


def dump_config(config: BaseModel) -> str:
    """YAML text of a whole config, keys in the order of the classes, that loads back to an equal config."""
    return dump(config.model_dump(mode="json"))


def preset_names(folder: Path = PRESETS) -> list[str]:
    """All presets, as the command line takes them; those in a folder after the others."""
    names = [found.relative_to(folder).with_suffix("").as_posix() for found in folder.rglob(f"*{FILE_SUFFIX}")]
    return sorted(names, key=lambda name: ("/" in name, name))


def settings_tree(settings: Sequence[str]) -> Tree:
    """The layer that ``key=value`` settings make together. UserError as `parse_setting`."""
    tree: Tree = {}
    for setting in settings:
        path, value = parse_setting(setting)
        _overlay(tree, nested(path, value))
    return tree


def parse_setting(setting: str) -> tuple[tuple[str, ...], Any]:
    """Read ``a.b.c=value`` into its path and its value, which is YAML.

    Raises:
        UserError: no ``=``, an empty part of the key, or a value that is not YAML.
    """
    key, equals, text = setting.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise UserError(f"--set {setting}: should be key=value, for example --set optimizer.lr=3e-4")
    try:
        return path, parse_value(text, f"--set {key.strip()}")
    except UserError as error:
        raise UserError(
            f"{error}; quote text with special characters, for example --set '{key.strip()}=\"...\"'"
        ) from None


def read_document(name: str, folder: Path, what: str) -> tuple[str, Document]:
    """A YAML file, or one of ``folder`` by its name: what messages call it, and what it holds.

    Args:
        name: the path of a file that ends in ``.yaml``, or a name.
        folder: where named ones are.
        what: what a named one is, for messages: preset.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if name.endswith(FILE_SUFFIX):
        return name, parse_document(_text(Path(name)), name)
    names = preset_names(folder)
    if name not in names:
        hint = f" (a file's name should end in {FILE_SUFFIX})" if Path(name).exists() else ""
        near = nearest(name, names)
        meant = f"; did you mean {near}?" if near else "."
        raise UserError(f"unknown {what} {name!r}{hint}{meant} {_PLURALS[what]}: {', '.join(names)}")
    called = f"{what} {name}"
    return called, parse_document(_text(folder / f"{name}{FILE_SUFFIX}"), called)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None


def _stack(tree: Tree, layer: Tree) -> None:
    """Lay ``layer`` over ``tree``, in place."""
    kept = _outliving(tree, layer)
    _overlay(tree, layer, of_kind=True)
    _overlay(tree, kept)
    _fill_kinds(tree, RunConfig)


def _outliving(tree: Tree, layer: Tree) -> Tree:
    """What is kept of the sections whose kind ``layer`` changes: what another kind means by the same key."""
    kept: Tree = {}
    for name, field in RunConfig.model_fields.items():
        below, above = tree.get(name), layer.get(name)
        if isinstance(below, dict) and isinstance(above, dict) and _is_another_kind(above, below):
            keys = {key for section in section_classes(field) for key in getattr(section, "outlive_kind", ())}
            kept[name] = {key: below[key] for key in keys if key in below and key not in above}
    return kept


def _overlay(below: Tree, above: Tree, of_kind: bool = False) -> None:
    """Merge mappings, in place; any other value replaces. With ``of_kind`` a new kind replaces its mapping whole."""
    for key, value in above.items():
        old = below.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and not (of_kind and _is_another_kind(value, old)):
            _overlay(old, value, of_kind)
        else:
            below[key] = value


def _is_another_kind(above: Tree, below: Tree) -> bool:
    return KIND in above and KIND in below and above[KIND] != below[KIND]


def _fill_kinds(tree: Tree, section: type[BaseModel]) -> None:
    """Write the default's kind where a layer set keys of a technique without naming it, in place.

    Only there: a key that no layer mentions stays out of the tree, so that the classes can tell what was set.
    """
    for name, field in section.model_fields.items():
        value = tree.get(name)
        classes = section_classes(field)
        if not isinstance(value, dict) or not classes:
            continue
        if kinds := by_kind(classes):
            kind = value.setdefault(KIND, default_kind(field))
            chosen = kinds.get(kind) if isinstance(kind, str) else None
        else:
            chosen = classes[0]
        if chosen:
            _fill_kinds(value, chosen)


def nested(path: tuple[str, ...], value: Any) -> Tree:
    """The tree in which ``value`` is at ``path``."""
    for key in reversed(path):
        value = {key: value}
    return dict(value)


def _paths(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """The path of a value, and of everything inside it."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from _paths(inner, (*path, key))
