"""What is wrong with a config, in words a user can act on: a line a problem, naming the key and where it was set."""

import difflib
import re
from collections.abc import Mapping

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipelines.schema import KIND, all_keys, by_kind, locate
from pipelines.yaml_text import Path, describe

# "Input should be ..., List should have ...": the key that stands before says what it is.
_SUBJECT = re.compile(r"^\w+ should")
# What pydantic calls the key of a mapping, as against its value.
_OF_A_KEY = "[key]"
_QUOTED = re.compile(r"'([^']*)'")


def explain(error: ValidationError, root: type[BaseModel], origins: Mapping[Path, str]) -> str:
    """All problems of a config tree, one line each.

    Args:
        error: what validating the tree as ``root`` raised.
        root: class of the tree.
        origins: where the value of a key was set ("preset small, line 3").
    """
    return "\n".join(_line(problem, root, origins) for problem in error.errors(include_url=False))


def nearest(word: str, choices: list[str]) -> str | None:
    """The choice that ``word`` was most likely meant to be, None if none is like it."""
    return next(iter(difflib.get_close_matches(word, choices, n=1)), None)


def did_you_mean(word: str, choices: list[str]) -> str:
    """The nearest choice as a hint, else all of them."""
    found = nearest(word, choices)
    return f"did you mean {found}?" if found else f"possible: {', '.join(choices)}"


def _line(problem: ErrorDetails, root: type[BaseModel], origins: Mapping[Path, str]) -> str:
    path, holders = locate(root, problem["loc"])
    value = problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            text = _unknown_key(path, holders, root)
        case "union_tag_invalid":
            context = problem["ctx"]
            kinds = [kind.strip("'") for kind in context["expected_tags"].split(", ")]
            path = (*path, KIND)
            # Of an item, its list; of what a user has named by a dotted key, what holds it.
            family = next(part for part in reversed(path[:-1]) if isinstance(part, str) and "." not in part)
            text = f"{context['tag']!r} is no kind of {family}; {did_you_mean(context['tag'], kinds)}"
        case "union_tag_not_found":
            path = (*path, KIND)
            text = f"is required here; possible: {', '.join(_kinds_at(path[:-1], root))}"
        case "value_error":
            text = str(problem["ctx"]["error"])
        case "missing":
            text = "is required here"
        case "too_short":
            least, found = problem["ctx"]["min_length"], problem["ctx"]["actual_length"]
            text = f"should have at least {least} item{'s' if least > 1 else ''}, got {found}"
        case "list_type":
            text = f"should be a list, got {describe(value)}"
        case "model_type" | "model_attributes_type" | "dict_type":
            text = f"should be a mapping of keys, got {describe(value)}"
            if isinstance(value, str) and value in _kinds_at(path, root):
                text += f"; did you mean {{{KIND}: {value}}}?"
        case "literal_error" if path and path[-1] == _OF_A_KEY:
            path = path[:-1]
            text = f"unknown; {did_you_mean(str(value), _QUOTED.findall(problem['ctx']['expected']))}"
        case "string_type" if isinstance(value, int | float):
            text = f"should be text, got {describe(value)}; quote it if it is meant as text"
        case _:
            text = f"{_SUBJECT.sub('should', problem['msg'])}, got {describe(value)}"
    # A rule over several keys names them itself; the place where one of them was set last would only mislead.
    origin = origins.get(path) if problem["type"] != "value_error" else None
    dotted = ".".join(map(str, path))
    return (f"{dotted}: {text}" if dotted else text) + (f" (set by {origin})" if origin else "")


def _unknown_key(path: Path, holders: tuple[type[BaseModel], ...], root: type[BaseModel]) -> str:
    section, key = path[:-1], str(path[-1])
    if "." in key:
        return "unknown key; in a file, nest keys instead of joining them with dots"
    siblings = list(dict.fromkeys(name for holder in holders for name in holder.model_fields))
    for kind, owner in _kinds_at(section, root).items():
        if key in owner.model_fields:
            chosen = next(iter(holders)).model_fields[KIND].default
            return f"belongs to {KIND} {kind}, but {'.'.join(map(str, section))}.{KIND} is {chosen}"
    if near := nearest(key, siblings):
        return f"unknown key; did you mean {'.'.join(map(str, (*section, near)))}?"
    if elsewhere := _nearest_elsewhere(key, all_keys(root)):
        return f"unknown key; did you mean {elsewhere}?"
    return f"unknown key; possible here: {', '.join(siblings)}"


def _kinds_at(section: Path, root: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The union's classes if ``section`` holds a union."""
    # Any key below the section makes `locate` return the classes that may hold it.
    _, holders = locate(root, (*section, ""))
    return by_kind(holders)


def _nearest_elsewhere(key: str, keys: list[str]) -> str | None:
    """The shallowest dotted key whose last part is ``key`` or like it: someone wrote lr and meant optimizer.lr."""
    last_parts: dict[str, str] = {}
    for dotted in sorted(keys, key=lambda dotted: dotted.count(".")):
        last_parts.setdefault(dotted.rpartition(".")[2], dotted)
    found = nearest(key, list(last_parts))
    return last_parts[found] if found else None
