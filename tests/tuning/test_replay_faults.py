"""Which faults of a run happen again in its replay."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipelines.config import RunConfig
from pipelines.run_folder import RunFolder, read_json
from tests.tuning.replayed import add_spike
from tuning.replay_faults import fault_cut_by, faults_left_out, needs_checkpoints, write_faults


def with_faults(*faults: dict[str, Any]) -> RunConfig:
    """Of a config that has these faults; only they are looked at."""
    return cast("RunConfig", SimpleNamespace(faults=[SimpleNamespace(**fault) for fault in faults]))


CONFIG = with_faults(
    {"kind": "corrupted_batches", "from_step": 3},
    {"kind": "nan_gradient", "step": 44},
    {"kind": "killed_worker", "step": 46},
    {"kind": "lr_jump", "step": 47, "steps": 4},
    {"kind": "weight_scaled", "step": 40},
)


def test_faults_of_operations_and_those_that_were_taken_back_do_not_happen_again(tmp_path: Path) -> None:
    assert faults_left_out(CONFIG, []) == [2]
    back = add_spike(RunFolder(tmp_path), 45, action="rewind", rewound_to=40)
    assert faults_left_out(CONFIG, [back]) == [1, 2]
    write_faults(RunFolder(tmp_path), CONFIG, [1, 2])
    happened = read_json(tmp_path / "faults.json")["happened"]
    assert [(fault["number"], fault["kind"]) for fault in happened] == [(1, "nan_gradient"), (2, "killed_worker")]


def test_without_any_nothing_is_written(tmp_path: Path) -> None:
    write_faults(RunFolder(tmp_path), CONFIG, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("start", "number"), [(46, None), (47, 3), (49, 3), (50, None), (44, None)])
def test_a_fault_that_lasts_over_the_start_is_cut_off(start: int, number: int | None) -> None:
    assert fault_cut_by(CONFIG, start) == number


def test_faults_of_checkpoints_need_them() -> None:
    assert not needs_checkpoints(CONFIG)
    assert needs_checkpoints(with_faults({"kind": "full_disk", "step": 4, "steps": 3}))
