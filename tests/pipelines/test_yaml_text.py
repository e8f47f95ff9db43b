"""Plain scalars mean what a person who writes a config means by them, and what cannot be meant is refused."""

import math
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipelines.errors import UserError
from pipelines.yaml_text import dump, parse_document, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("2.5e+2", 250.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("010", 10),
        ("-7", -7),
        ("true", True),
        ("null", None),
        ("", None),
        ("1:30", "1:30"),
        ("no", "no"),
        ("2024-01-01", "2024-01-01"),
        ("0x1f", "0x1f"),
        ("1e", "1e"),
        ("'1e-3'", "1e-3"),
        ("sqlite:///runs.db", "sqlite:///runs.db"),
        ("{kind: global, max_norm: 1e-1}", {"kind": "global", "max_norm": 0.1}),
    ],
)
def test_a_plain_scalar_is_what_it_looks_like(text: str, value: Any) -> None:
    found = parse_value(text, "here")
    assert found == value
    assert type(found) is type(value)


def test_infinity_and_nan_are_floats_for_the_config_classes_to_refuse() -> None:
    assert parse_value("-.inf", "here") == -math.inf
    assert math.isnan(parse_value(".nan", "here"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\nb: 2\na: 3\n", "conf.yaml, line 3: a is given twice (first in line 1)"),
        (
            "model:\n  moe: {top_k: 1, top_k: 2}\n",
            "conf.yaml, line 2: model.moe.top_k is given twice (first in line 2)",
        ),
        ("- a\n- b\n", "conf.yaml: should hold a mapping of config keys, but holds a list"),
        ("just text", "conf.yaml: should hold a mapping of config keys, but holds the text 'just text'"),
        ("# a comment\n", "conf.yaml: should hold a mapping of config keys, but holds nothing"),
        ("a: 1\nb: [1, 2\n", "conf.yaml, line 3: not valid YAML"),
        ("a: b: c", "conf.yaml, line 1: not valid YAML"),
        ("\n3: x\n", "conf.yaml, line 2: a key should be text, got 3"),
        ("[1]: x\n", "conf.yaml, line 1: a key should be text, got a collection"),
        ("a: 1\n---\nb: 2\n", "conf.yaml, line 2: not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "conf.yaml, line 1: the tag tag:yaml.org,2002:python/object/apply"),
        ("a: !!python/name:os.getcwd\n", "conf.yaml, line 1: not valid YAML"),
        ("a: &x {b: *x}\n", "conf.yaml, line 1: an alias (*) that contains itself"),
        (f"a: {'9' * 5000}\n", "conf.yaml, line 1: "),
        ("a: \x00\n", "conf.yaml: not valid YAML"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(text: str, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_document(text, "conf.yaml")
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)


def test_lines_of_keys_and_items_are_known() -> None:
    document = parse_document("a:\n  b: 1\n  c:\n    - x\n    - y\n", "conf.yaml")
    assert document.tree == {"a": {"b": 1, "c": ["x", "y"]}}
    assert document.lines[("a", "b")] == 2
    assert document.lines[("a", "c")] == 3
    assert document.lines[("a", "c", 1)] == 5


plain_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.from_regex(r"[-+]?[0-9.:_xe]{1,6}([eE][-+]?[0-9]{1,2})?", fullmatch=True),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text("abkey_19e-.", min_size=1), plain_values | st.lists(plain_values)))
@example({"name": "1e-3"})
@example({"name": "\x85", "other": "a\u2028 b"})
@example({"name": "010", "lr": 1e-05, "flag": "no", "date": "2024-01-01", "empty": ""})
def test_what_is_dumped_is_read_back_equal(tree: dict[str, Any]) -> None:
    found = parse_document(dump(tree), "dumped").tree
    assert found == tree
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in tree.items()}
    assert list(found) == list(tree)


def test_dumped_text_is_read_alike_by_yaml_1_1_readers() -> None:
    tree = {"a": "no", "b": "1:30", "c": "2024-01-01", "d": "010", "e": 0.5, "f": None}
    assert yaml.safe_load(dump(tree)) == tree
