"""What is refused for want of a measure is what the measures of such a run lack, and nothing else."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import RunConfig
from pipelines.errors import UserError
from tests.tuning.study_file import write_study
from tuning.measure_names import MEASURES, OF_EVENTS
from tuning.measures import measure
from tuning.series import Series
from tuning.study_loading import load_study, trial_configs

WARMUP = 5


def left_by(config: RunConfig) -> Series:
    """What a run with this config leaves when all goes well."""
    steps = config.steps
    experts, clips = config.model.moe.num_experts > 0, config.stability.clip.kind != "none"
    train = {"train/loss": [5.0 - step / steps for step in range(steps)], "train/grad_norm": [1.0] * steps}
    train["train/step_seconds"] = [0.1] * steps
    train |= {"moe/max_vio_batch": [0.5] * steps} if experts else {}
    train |= {"train/clipped": [0.0] * steps} if clips else {}
    validation = {"val/loss": 4.0} | ({"moe/max_vio_global": 0.5, "moe/dead_experts": 0.0} if experts else {})
    return Series("finished", steps, train, validation)


@pytest.mark.parametrize(
    ("preset", "clip", "steps"),
    [
        (preset, clip, WARMUP + scored)
        for preset, clip, scored in product(("micro", "dense-tiny"), ("none", "global"), (50, 51))
    ],
)
def test_a_measure_is_refused_exactly_where_a_run_would_lack_it(
    preset: str, clip: str, steps: int, tmp_path: Path
) -> None:
    schedule = {"kind": "simple", "steps": steps, "warmup_steps": WARMUP}
    config = {"schedule": schedule, "stability": {"clip": {"kind": clip}}}
    changes: dict[str, Any] = {"base": [preset], "config": config, "claims.0.conditions.0.right": 9.0}
    [run, _] = trial_configs(load_study(write_study(tmp_path, changes)))
    has = {*measure(left_by(run), run), *OF_EVENTS}
    for name in MEASURES:
        study = write_study(tmp_path, {**changes, "claims.0.conditions.0.left.measure": name})
        if name in has:
            load_study(study)
        else:
            with pytest.raises(UserError, match=f"has no {name}, for "):
                load_study(study)
