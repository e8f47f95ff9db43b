"""The keys of configs that vary between runs: which they are, what kind, and how they are written."""

from collections import Counter
from collections.abc import Mapping, Sequence

from pipelines.flatten import Scalar
from pipelines.plotting import short_number

_MISSING = object()
_LONGEST_VALUE = 40
_DIGITS = 4

Settings = Mapping[str, Scalar]


def varying_keys(settings: Sequence[Settings]) -> list[str]:
    """The keys that do not have the same value everywhere, in the order of the first config that has them.

    Keys that only come and go with the ``kind`` of their section, with one value wherever they are, say nothing that
    the kind does not.
    """
    every = list(dict.fromkeys(key for each in settings for key in each))
    varying = [key for key in every if len({each.get(key, _MISSING) for each in settings}) > 1]
    return [key for key in varying if not _follows_a_kind(key, varying, settings)]


def _follows_a_kind(key: str, varying: Sequence[str], settings: Sequence[Settings]) -> bool:
    values = {each[key] for each in settings if key in each}
    parts = key.split(".")
    sections = (".".join([*parts[:length], "kind"]) for length in range(1, len(parts)))
    return len(values) == 1 and any(section in varying for section in sections if section != key)


def is_numeric(key: str, settings: Sequence[Settings]) -> bool:
    """Whether all values of the key are numbers (where it is there at all), and at least two of them."""
    values = {each[key] for each in settings if key in each}
    return len(values) > 1 and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last word of each key (for a ``kind`` the one before); as many words as tell it from the others."""
    found = {}
    for key in keys:
        parts = key.removesuffix(".kind").split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[-length:])
            others = (other.removesuffix(".kind") for other in keys if other != key)
            if not any(other == name or other.endswith(f".{name}") for other in others):
                break
        else:
            name = key
        found[key] = name
    assert max(Counter(found.values()).values(), default=1) == 1
    return found


def shown(value: Scalar) -> str:
    """A value for people: 0.003, 3e-5, 250, none, yes."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}" if abs(value) >= 10_000 else str(value)
        case float():
            return short_number(value, _DIGITS)
        case _:
            return value if len(value) <= _LONGEST_VALUE else f"{value[: _LONGEST_VALUE - 1]}…"
