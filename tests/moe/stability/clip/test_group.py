import pytest
from pydantic import ValidationError

from moe.config.clip import GroupClipConfig
from tests.moe.toy import GROUPS, Toy, drawn, norm_of

LIMITS = {"dense": 1.5, "router": 100.0, "experts": 0.5}


def test_each_group_is_clipped_to_its_own_norm() -> None:
    gradients = drawn(1)
    config = GroupClipConfig(dense_max_norm=1.5, router_max_norm=100.0, experts_max_norm=0.5)
    clipped, figures = Toy(config).clip(gradients)
    for name, gradient in gradients.items():
        whole = norm_of([g for other, g in gradients.items() if GROUPS[other] == GROUPS[name]])
        factor = min(1.0, LIMITS[GROUPS[name]] / whole)
        assert factor == 1.0 or GROUPS[name] != "router"
        assert norm_of([clipped[name] - factor * gradient]) < 1e-5 * norm_of([gradient])
    assert figures["clipped"] == 1.0
    before, after = norm_of(list(gradients.values())), norm_of(list(clipped.values()))
    assert figures["clip_factor"] == pytest.approx(after / before, rel=1e-5)


def test_a_spike_in_one_group_leaves_the_others_as_they_are() -> None:
    gradients = drawn(1, scale=0.01)
    gradients["layers.0.experts.w_up"] *= 1e4
    clipped, _ = Toy(GroupClipConfig()).clip(gradients)
    for name, gradient in gradients.items():
        assert clipped[name].equal(gradient) == (GROUPS[name] != "experts")


def test_small_gradients_pass_untouched() -> None:
    gradients = drawn(1, scale=1e-3)
    clipped, figures = Toy(GroupClipConfig()).clip(gradients)
    assert all(clipped[name].equal(gradient) for name, gradient in gradients.items())
    assert figures == {"clip_factor": 1.0, "clipped": 0.0}
    zeros = {name: 0 * gradient for name, gradient in gradients.items()}
    assert Toy(GroupClipConfig()).clip(zeros)[1] == {"clip_factor": 1.0, "clipped": 0.0}


def test_max_norm_stands_for_the_groups_without_a_limit_of_their_own() -> None:
    assert GroupClipConfig(router_max_norm=0.1).limits(2.0) == {"dense": 2.0, "router": 0.1, "experts": 2.0}


def test_a_max_norm_that_no_group_takes_is_refused() -> None:
    all_three = {"dense_max_norm": 1.0, "router_max_norm": 2.0, "experts_max_norm": 3.0}
    config = GroupClipConfig.model_validate(all_three)
    assert GroupClipConfig.model_validate(config.model_dump()) == config, "what is written can be read back"
    with pytest.raises(ValidationError, match="max_norm has no effect"):
        GroupClipConfig.model_validate({**all_three, "max_norm": 0.5})
