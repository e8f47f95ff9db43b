import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.scratch import PREFIX, scratch_folder, sweep

PROGRAM = """
import sys, pathlib
from pipelines.scratch import scratch_folder
with scratch_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "half").write_text("written")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_what_is_left_in_the_folder_is_gone_afterwards_also_on_failure(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as folder:
        (folder / "file").touch()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileExistsError), scratch_folder(tmp_path) as folder:
        folder.mkdir()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_process_is_swept_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert sweep(tmp_path)
        assert len(list(tmp_path.glob(f"{PREFIX}*/content/half"))) == 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len(list(tmp_path.iterdir())) == 1
    with scratch_folder(tmp_path):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_an_owner_is_swept_once_it_is_old(tmp_path: Path) -> None:
    folder = tmp_path / f"{PREFIX}x"
    folder.mkdir()
    assert sweep(tmp_path)
    os.utime(folder, (time.time() - 3600,) * 2)
    assert not sweep(tmp_path)
    assert not folder.exists()


def test_a_folder_whose_owner_has_not_locked_it_yet_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / f"{PREFIX}x"
    folder.mkdir()
    (folder / "owner.lock").touch()
    assert sweep(tmp_path)
    (folder / "content").mkdir()
    assert not sweep(tmp_path)
    assert not folder.exists()
