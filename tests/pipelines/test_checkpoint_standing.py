from pathlib import Path

import pytest
import torch

from moe.state import TrainingState
from pipelines.checkpoint_standing import (
    condemn,
    kept_for,
    mark,
    newer_than,
    newest_good,
    newest_valid,
    pin,
    prune,
    standing,
)
from pipelines.checkpoints import load, save

STEPS = (10, 20, 30, 40, 50)


@pytest.fixture
def paths(tmp_path: Path) -> dict[int, Path]:
    """Five checkpoints: good up to step 30."""
    made = {step: save(tmp_path, TrainingState({"w": torch.ones(3)}), step=step, metadata={}) for step in STEPS}
    for step in (10, 20, 30):
        mark(made[step], "good")
    return made


def _left(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_a_run_resumes_from_the_newest_that_no_event_has_made_suspect(paths: dict[int, Path], tmp_path: Path) -> None:
    assert newest_valid(tmp_path) == paths[50]
    assert newest_good(tmp_path) == paths[30]
    condemn(tmp_path, "spike at step 55")
    assert {step: standing(path).state for step, path in paths.items()} == {
        10: "good", 20: "good", 30: "good", 40: "suspect", 50: "suspect"
    }  # fmt: skip
    assert newest_valid(tmp_path) == paths[30]
    assert newer_than(tmp_path, paths[30]) == [paths[40], paths[50]]
    for path in newer_than(tmp_path, paths[30]):
        mark(path, "discarded")
    assert newest_valid(tmp_path) == paths[30]


def test_an_event_pins_the_newest_good_checkpoint_for_good(paths: dict[int, Path], tmp_path: Path) -> None:
    condemn(tmp_path, "spike at step 55")
    condemn(tmp_path, "spike at step 55")
    assert standing(paths[30]).pinned_by == ("spike at step 55",)
    for step in (60, 70, 80):
        mark(save(tmp_path, TrainingState({"w": torch.ones(3)}), step=step, metadata={}), "good")
    prune(tmp_path, 1)
    assert _left(tmp_path) == [30, 80]


def test_the_newest_good_one_is_kept_however_many_are_newer(paths: dict[int, Path], tmp_path: Path) -> None:
    assert prune(tmp_path, 1) == [paths[40], paths[20], paths[10]]
    assert _left(tmp_path) == [30, 50]


def test_discarded_ones_go_at_once_and_suspect_ones_when_newer_ones_suffice(
    paths: dict[int, Path], tmp_path: Path
) -> None:
    mark(paths[40], "suspect")
    mark(paths[50], "discarded")
    assert prune(tmp_path, 2) == [paths[50], paths[10]]
    assert _left(tmp_path) == [20, 30, 40]
    for step in (60, 70):
        save(tmp_path, TrainingState({"w": torch.ones(3)}), step=step, metadata={})
    prune(tmp_path, 2)
    assert _left(tmp_path) == [30, 60, 70]


def test_without_a_resumable_one_suspects_stay_as_evidence(paths: dict[int, Path], tmp_path: Path) -> None:
    for path in paths.values():
        mark(path, "suspect")
    assert newest_valid(tmp_path) is None
    assert prune(tmp_path, 1) == []


def test_a_pinned_one_is_kept_beside_one_of_the_same_step_that_takes_its_place(
    paths: dict[int, Path], tmp_path: Path
) -> None:
    for timeline in (1, 2):
        pin(paths[40], f"event {timeline}")
        mark(paths[40], "discarded")
        weights = TrainingState({"w": torch.full((3,), 1.0 + timeline)})
        assert save(tmp_path, weights, step=40, metadata={}, timeline=timeline) == paths[40]
        assert standing(paths[40]).pinned_by == ()
        prune(tmp_path, 2)
    for timeline in (0, 1):
        (kept,) = kept_for(tmp_path, f"event {timeline + 1}")
        assert kept.name == f"step-00000040-t{timeline}"
        state = TrainingState({"w": torch.zeros(3)})
        assert load(kept, state)["timeline"] == timeline
        assert state.tensors["w"].tolist() == [1.0 + timeline] * 3
    assert kept_for(tmp_path, "event 3") == []
    assert newest_valid(tmp_path) == paths[50]


def test_a_damaged_one_leaves_its_pins_to_the_one_that_takes_its_place(paths: dict[int, Path], tmp_path: Path) -> None:
    pin(paths[40], "event")
    (paths[40] / "rank-00000.safetensors").write_bytes(b"")
    save(tmp_path, TrainingState({"w": torch.ones(3)}), step=40, metadata={})
    assert (standing(paths[40]).pinned_by, standing(paths[40]).state) == (("event",), "unconfirmed")
    assert _left(tmp_path) == list(STEPS)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "excellent"}'])
def test_an_illegible_standing_counts_as_unconfirmed(paths: dict[int, Path], content: str) -> None:
    (paths[30] / "standing.json").write_text(content)
    assert standing(paths[30]).state == "unconfirmed"
