import typing

import pytest

from moe.config.base import Config
from moe.config.model import ModelConfig
from moe.config.stability import StabilityConfig
from moe.stability.families import FAMILIES, build_techniques
from moe.stability.technique import Technique
from tests.moe.build import ALONE


def kinds(field: str) -> set[type[Config]]:
    """The config classes that the field's (discriminated) union allows."""
    annotation = StabilityConfig.model_fields[field].annotation
    return set(typing.get_args(annotation)) or {typing.cast(type[Config], annotation)}


def test_every_family_of_the_config_is_built() -> None:
    assert FAMILIES.keys() == StabilityConfig.model_fields.keys()


@pytest.mark.parametrize("field", StabilityConfig.model_fields)
def test_every_kind_has_one_implementation(field: str) -> None:
    implementations = FAMILIES[field]
    assert kinds(field) == set(implementations)
    # A family without kinds is one class whose coefficient of 0 is off.
    defaults = {config: config.model_fields["kind"].default for config in implementations if len(implementations) > 1}
    active = [made for config, made in implementations.items() if defaults.get(config) != "none"]
    assert Technique not in active, "a kind that does nothing"
    assert len(set(active)) == len(active), "two kinds that do the same"
    for config, made in implementations.items():
        assert isinstance(made(config(), ModelConfig(), ALONE), made)


def test_techniques_are_those_that_the_config_names() -> None:
    built = build_techniques(StabilityConfig(), ModelConfig(), ALONE)
    assert {field: type(technique) for field, technique in built.items()} == {
        field: FAMILIES[field][type(getattr(StabilityConfig(), field))] for field in FAMILIES
    }
