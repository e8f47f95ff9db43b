"""What the treatments of a replay change, and where they cannot act."""

from typing import Any

import pytest

from pipelines.errors import UserError
from pipelines.loading import load_config
from pipelines.spike_event import Kind
from tuning.treatments import AS_IT_WAS, TREATMENTS, Change, Situation, refuse_unknown, what_changes


def situation(*settings: str, start: int = 100, onset: int = 131, kind: Kind = "loss") -> Situation:
    config = load_config(["micro"], ["schedule.steps=200", *settings])
    return Situation(config, kind, start, onset, 150)


def changed(name: str, *settings: str, **place: Any) -> Change:
    change = TREATMENTS[name].change(situation(*settings, **place))
    assert isinstance(change, Change), change
    return change


def obstacle(name: str, *settings: str, **place: Any) -> str:
    change = TREATMENTS[name].change(situation(*settings, **place))
    assert isinstance(change, str), change
    return change


def test_every_treatment_gives_a_config_that_holds_or_says_why_it_cannot_act() -> None:
    for name, treatment in TREATMENTS.items():
        change = treatment.change(situation())
        if isinstance(change, str):
            assert name == "fp32"
            continue
        load_config(["micro"], ["schedule.steps=200"], trees={name: change.config})
        assert (change == Change()) == (name == AS_IT_WAS)


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        (("stability.clip={kind: global, max_norm: 2.0}",), 0.5),
        (("stability.clip={kind: zclip, max_norm: null}",), 0.25),
        (("stability.clip.kind=none",), 0.25),
        (("stability.clip.kind=adagc",), 0.25),
    ],
)
def test_a_tight_clip_is_at_a_quarter_of_the_limit(settings: tuple[str, ...], limit: float) -> None:
    change = changed("tight-clip", *settings)
    assert change.config["stability"]["clip"] == {"kind": "global", "max_norm": limit}
    assert change.fresh == ("stability.clip.",)


def test_a_tight_clip_is_as_tight_in_stages_that_have_a_limit_of_their_own() -> None:
    stages = [{"steps": 100, "clip_max_norm": 2.0}, {"steps": 100, "lr": {"kind": "linear"}}]
    trees: dict[str, Any] = {"mine": {"schedule": {"kind": "stages", "stages": stages}}}
    plain = load_config(["micro"], trees=trees)
    change = TREATMENTS["tight-clip"].change(Situation(plain, "loss", 90, 99, 120))
    assert isinstance(change, Change)
    config = load_config(["micro"], trees={**trees, "tight-clip": change.config})
    assert [stage.clip_max_norm for stage in config.schedule.as_stages()] == [0.5, None]
    assert [stage.lr for stage in config.schedule.as_stages()] == [stage.lr for stage in plain.schedule.as_stages()]


def test_zclip_knows_the_usual_norm_before_the_spike_comes() -> None:
    assert changed("zclip", onset=107).config["stability"]["clip"]["warmup_steps"] == 6
    assert changed("zclip", onset=180).config["stability"]["clip"]["warmup_steps"] == 25
    assert "2 steps before the spike, and there are 1" in obstacle("zclip", onset=102)
    assert obstacle("zclip", "stability.clip.kind=zclip") == "stability.clip.kind is zclip already"


def test_anticipation_is_at_its_full_lag_when_the_spike_comes() -> None:
    assert changed("anticipate", onset=103).config["stability"]["anticipation"] == {"kind": "always", "lag": 2}
    longer = changed("anticipate", "stability.anticipation={kind: triggered, lag: 6, at_steps: [9]}")
    assert longer.config["stability"]["anticipation"]["lag"] == 6
    assert "its first step routes as ever" in obstacle("anticipate", onset=101)
    assert "always already" in obstacle("anticipate", "stability.anticipation.kind=always")


@pytest.mark.parametrize(
    ("name", "settings", "place", "why"),
    [
        ("fp32", (), {}, "precision.compute is fp32 and precision.fp8.kind is none already"),
        ("swiglu-clamp", ("model.activation.kind=situ_glu",), {}, "model.activation.kind is situ_glu"),
        ("fresh-moments", (), {"start": 0}, "where the moments are 0 in any case"),
        ("skip-samples", (), {"kind": "replica_mismatch"}, "no batch makes replicas differ"),
    ],
)
def test_what_cannot_act_says_why(name: str, settings: tuple[str, ...], place: dict[str, Any], why: str) -> None:
    assert why in obstacle(name, *settings, **place)


def test_fp32_takes_fp8_back_too() -> None:
    change = changed("fp32", "precision={compute: bf16, fp8: {kind: deepseek_v3}}")
    assert change.config["precision"] == {"compute": "fp32", "fp8": {"kind": "none"}}


def test_a_change_in_words() -> None:
    assert what_changes(changed("half-lr"), 100, 8) == "times 0.5 from step 101 on"
    assert what_changes(changed("skip-samples"), 100, 8) == "8 samples"
    assert what_changes(changed("zclip", "stability.clip.kind=none"), 100, 8).endswith("max_norm=null")


def test_an_unknown_treatment_is_one_line_with_those_that_there_are() -> None:
    with pytest.raises(
        UserError, match=r"^--with halflr: no such treatment; did you mean half-lr\? there are as-it-was"
    ):
        refuse_unknown(["zclip", "halflr"])
