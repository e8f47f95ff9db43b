"""Which faults of a run happen again in its replay."""

from pathlib import Path

import pytest

from moe.config.trainer import ParallelConfig
from moe.parallel import join
from pipelines.faults.once import FaultRecord
from pipelines.run_folder import RunFolder
from pipelines.spike_event import read_events
from tests.pipelines.small_run import small_config
from tests.tuning.replayed import add_spike, replay, run_of, write_run
from tuning.replay_faults import fault_cut_by, faults_left_out, needs_checkpoints, write_faults
from tuning.replay_plan import make_plan
from tuning.reproduction import compare

FAULTS = (
    "schedule.steps=60",
    "faults=["
    "{kind: corrupted_batches, share: 0.1, from_step: 3}, {kind: nan_gradient, step: 44}, "
    "{kind: killed_worker, step: 46}, {kind: lr_jump, step: 47, steps: 4, factor: 2.0}, "
    "{kind: weight_scaled, step: 40, group: experts, factor: 2.0}]",
)
CONFIG = small_config(*FAULTS)


def test_faults_of_operations_and_those_that_were_taken_back_do_not_happen_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert faults_left_out(CONFIG, []) == [2]
    back = add_spike(folder, 45, action="rewind", rewound_to=40)
    assert faults_left_out(CONFIG, [back]) == [1, 2]
    write_faults(folder, CONFIG, [1, 2])
    record = FaultRecord(folder, join(ParallelConfig(device="cpu")))
    assert [number for number in range(5) if record.is_over(number)] == [1, 2]


def test_without_any_nothing_is_written(tmp_path: Path) -> None:
    write_faults(RunFolder(tmp_path), CONFIG, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("start", "number"), [(46, None), (47, 3), (49, 3), (50, None), (44, None)])
def test_a_fault_that_lasts_over_the_start_is_cut_off(start: int, number: int | None) -> None:
    assert fault_cut_by(CONFIG, start) == number


def test_a_run_with_faults_of_checkpoints_has_a_config_for_its_replay(tmp_path: Path) -> None:
    assert not needs_checkpoints(CONFIG)
    full = ("schedule.steps=60", "checkpoint.every_steps=20", "faults=[{kind: full_disk, step: 15, steps: 10}]")
    run = write_run(tmp_path / "spiky", *full)
    add_spike(run, 48)
    assert make_plan(run, "1", ["half-lr"], 5, []).faults_left_out == (0,)


@pytest.mark.slow
def test_a_fault_happens_again_on_the_way_to_its_own_event_and_not_to_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both replays begin with the checkpoint of step 30; on the way to the second event the first fault was undone."""
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))
    scaled = "kind: weight_scaled, parameters: head.weight, factor: 20.0"
    run = run_of(
        tmp_path / "spiky",
        *("schedule.steps=60", "checkpoint.every_steps=30", "response.rungs=[rewind]", "response.calm_steps=5"),
        f"faults=[{{{scaled}, step: 40}}, {{{scaled}, step: 52}}]",
    )
    assert [(event.step, event.rewound_to is not None) for event in read_events(run.events)] == [(40, True), (52, True)]
    for number, left_out in ((1, ()), (2, (0,))):
        plan = make_plan(run, str(number), ["half-lr"], 2, [])
        assert (plan.start.step, plan.faults_left_out) == (30, left_out)
        found = compare(plan, replay(plan, plan.arms[0], tmp_path / f"replay-{number}").spool, ())
        assert found.is_exact, found.sentence
