"""What the config classes say about a place in the tree: which class holds it, which keys and kinds it may have."""

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipelines.yaml_text import Path

KIND = "kind"
"""The key that chooses a class from a union."""


def section_classes(field: FieldInfo) -> tuple[type[BaseModel], ...]:
    """The config classes that a field can hold, also inside a union, an optional or a list; none for a plain value."""
    return tuple(_classes_in(field.annotation))


def _classes_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _classes_in(argument)


def by_kind(classes: tuple[type[BaseModel], ...]) -> dict[str, type[BaseModel]]:
    """The classes of a union by their ``kind``; empty when there is nothing to choose."""
    if len(classes) < 2:
        return {}
    return {kind: found for found in classes for kind in get_args(found.model_fields[KIND].annotation)}


def default_kind(field: FieldInfo) -> str | None:
    """The ``kind`` of a field's default."""
    return getattr(field.get_default(call_default_factory=True, validated_data={}), KIND, None)


def locate(root: type[BaseModel], location: Path) -> tuple[Path, tuple[type[BaseModel], ...]]:
    """Translate pydantic's location of an error, where what a union chose stands between two keys, into a path of keys.

    Returns:
        The path, and the classes that may hold its last key (more than one if a union is not decided yet; none if the
        path leaves the tree).
    """
    path: Path = ()
    holders: tuple[type[BaseModel], ...] = ()
    here: tuple[type[BaseModel], ...] = (root,)
    is_name = False
    for part in location:
        kinds = by_kind(here)
        if not is_name and part in kinds:
            here = (kinds[str(part)],)
            continue
        if not is_name and part in {found.__name__ for found in here}:
            continue
        path = (*path, part)
        if is_name:
            is_name = False
        elif isinstance(part, str):
            holders = here
            fields = [found.model_fields[part] for found in here if part in found.model_fields]
            here = tuple(dict.fromkeys(choice for field in fields for choice in section_classes(field)))
            # In a mapping of sections the user's own name comes next.
            is_name = any(get_origin(field.annotation) is dict for field in fields)
    return path, holders


def all_keys(root: type[BaseModel]) -> list[str]:
    """Every dotted key of the tree, those of all kinds included, in the order of the classes."""
    keys: dict[str, None] = {}
    for name, field in root.model_fields.items():
        keys[name] = None
        for section in section_classes(field):
            keys.update(dict.fromkeys(f"{name}.{key}" for key in all_keys(section)))
    return list(keys)
