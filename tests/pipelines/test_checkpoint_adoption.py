"""A run that goes on from another's state."""

import shutil
from pathlib import Path

import pytest

from pipelines.checkpoint_adoption import adopt
from pipelines.checkpoint_manifest import FileRecord, Manifest, checkpoint_folders, sha256_of, step_name, write_manifest
from pipelines.checkpoint_standing import mark, newest_valid, standing

DATA = "rank-0.safetensors"


def checkpoint(folder: Path, step: int, content: str) -> Path:
    path = folder / step_name(step)
    path.mkdir(parents=True)
    (path / DATA).write_text(content)
    record = FileRecord(size=len(content), sha256=sha256_of(path / DATA))
    write_manifest(path, Manifest(step=step, files={DATA: record}, tensors={}, scalars={}, metadata={}))
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        checkpoint(tmp_path / "own", step, f"own {step}")
    return tmp_path / "own"


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "donor", 20, "donor 20")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: (path / DATA).read_text() for path in checkpoint_folders(folder)}


ADOPTED = {step_name(10): "own 10", step_name(20): "donor 20"}


def test_a_resume_takes_the_adopted_one_and_own_ones_of_that_step_and_later_are_gone(own: Path, donor: Path) -> None:
    adopt(own, donor)
    assert newest_valid(own) == own / step_name(20)
    assert contents(own) == ADOPTED
    assert sorted(path.name for path in own.iterdir()) == sorted(ADOPTED)
    assert contents(donor.parent) == {step_name(20): "donor 20"}


def test_twice_is_the_same_whatever_was_saved_in_between(own: Path, donor: Path) -> None:
    adopt(own, donor)
    checkpoint(own, 40, "own 40")
    adopt(own, donor)
    assert contents(own) == ADOPTED
    assert newest_valid(own) == own / step_name(20)


def test_what_the_other_run_thought_of_it_is_not_taken_over(own: Path, donor: Path) -> None:
    mark(donor, "suspect")
    assert newest_valid(donor.parent) is None
    adopt(own, donor)
    assert standing(own / step_name(20)).state == "unconfirmed"
    assert newest_valid(own) == own / step_name(20)
    assert standing(donor).state == "suspect"


def test_an_adoption_that_was_cut_short_is_done_again(own: Path, donor: Path) -> None:
    # As a kill leaves it: a draft without its manifest, and an own checkpoint that is half removed.
    shutil.copytree(donor, own / f".adopted-{donor.name}")
    (own / f".adopted-{donor.name}" / "manifest.json").unlink()
    (own / step_name(30) / "manifest.json").unlink()
    assert newest_valid(own) == own / step_name(20)
    adopt(own, donor)
    assert contents(own) == ADOPTED
    assert sorted(path.name for path in own.iterdir()) == sorted(ADOPTED)


def test_a_run_without_checkpoints_adopts_too(tmp_path: Path, donor: Path) -> None:
    (tmp_path / "new").mkdir()
    adopt(tmp_path / "new", donor)
    assert newest_valid(tmp_path / "new") == tmp_path / "new" / step_name(20)
