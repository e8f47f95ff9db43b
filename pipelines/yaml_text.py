"""The YAML that configs are written in: plain scalars as in YAML 1.2, no duplicate keys, every value with its line.

PyYAML reads YAML 1.1, where ``1e-3`` is a string (it has no dot), ``010`` is 8, ``1:30`` is 90 and ``2024-01-01`` is a
date. Here a plain scalar is null, true, false, a decimal integer, a float, or else text.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from pipelines.errors import UserError

Path = tuple[str | int, ...]
"""A place in a tree: keys of mappings and indices of lists."""


@dataclass(frozen=True)
class Document:
    """One YAML mapping, and the line (from 1) on which each of its keys and list items starts."""

    tree: dict[str, Any]
    lines: dict[Path, int]


class _Loader(yaml.SafeLoader):
    """Knows no plain scalar but those below."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that either reading, this one or YAML 1.1, would take for something else."""


_Loader.yaml_implicit_resolvers = {}

_PLAIN_SCALARS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9](_?[0-9])*", [*"-+0123456789"]),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9](_?[0-9])*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
)
for _tag, _pattern, _first in _PLAIN_SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)

_COLLECTION_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


def _int(_: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    # PyYAML's own constructor reads a leading 0 as octal, and a colon as base 60.
    return int(node.value)


def _float(_: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    # Python spells .inf and .nan without the dot.
    return float(re.sub(r"\.(?=[inIN])", "", node.value))


def _str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds these line breaks into spaces unless the text is in double quotes, where it escapes them.
    style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _str)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def parse_document(text: str, source: str) -> Document:
    """Read one YAML mapping. ``source`` names it in errors.

    Raises:
        UserError: not YAML, not a mapping, a key that is given twice or is not text; with the line.
    """
    value, lines = _parse(text, source)
    if not isinstance(value, dict):
        raise UserError(f"{source}: should hold a mapping of config keys, but holds {describe(value)}")
    return Document(value, lines)


def parse_value(text: str, source: str) -> Any:
    """Read one YAML value of any kind, such as what follows the = of ``--set``. ``source`` names it in errors."""
    return _parse(text, source)[0]


def dump(tree: dict[str, Any]) -> str:
    """YAML text, keys in the tree's own order, that `parse_document` reads back equal."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def describe(value: Any) -> str:
    """A value for an error message, in few words."""
    match value:
        case None:
            return "nothing"
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case bool():
            return str(value).lower()
        case str():
            return f"the text {value!r}"
        case _:
            return repr(value)


def _parse(text: str, source: str) -> tuple[Any, dict[Path, int]]:
    try:
        # The constructor refuses characters that YAML forbids, so it belongs inside.
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        builder = _Builder(loader, source)
        return builder.build(node, (), ()), builder.lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{source}{_at(mark)}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from None


def _at(mark: yaml.Mark | None) -> str:
    return f", line {mark.line + 1}" if mark else ""


def _text(node: yaml.Node) -> str:
    return str(node.value) if isinstance(node, yaml.ScalarNode) else "a collection"


class _Builder:
    """Turns YAML nodes into plain values. PyYAML's own constructor lets the last of two equal keys win in silence."""

    def __init__(self, loader: _Loader, source: str) -> None:
        self.loader = loader
        self.source = source
        self.lines: dict[Path, int] = {}

    def build(self, node: yaml.Node, path: Path, parents: tuple[yaml.Node, ...]) -> Any:
        self.lines[path] = node.start_mark.line + 1
        if node in parents:
            raise UserError(f"{self.source}{_at(node.start_mark)}: an alias (*) that contains itself")
        within = (*parents, node)
        if isinstance(node, yaml.CollectionNode) and node.tag not in _COLLECTION_TAGS:
            raise UserError(f"{self.source}{_at(node.start_mark)}: the tag {node.tag} has no meaning here")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, within)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, index), within) for index, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path, within: tuple[yaml.Node, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            where = f"{self.source}{_at(key_node.start_mark)}"
            if not isinstance(key, str):
                raise UserError(f"{where}: a key should be text, got {_text(key_node)}")
            at = (*path, key)
            if key in result:
                dotted = ".".join(map(str, at))
                raise UserError(f"{where}: {dotted} is given twice (first in line {self.lines[at]})")
            result[key] = self.build(value_node, at, within)
            self.lines[at] = key_node.start_mark.line + 1
        return result

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            return self.loader.construct_object(node)
        except ValueError as error:
            raise UserError(f"{self.source}{_at(node.start_mark)}: {error}") from None
