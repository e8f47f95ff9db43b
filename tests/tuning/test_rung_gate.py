import math
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path

import pytest

from pipelines.run_folder import RunFolder
from tests.full_disk import full_disk
from tuning import rung_gate
from tuning.rung_gate import close_gate, forget_gate, knock, knocked, open_gate, wait_at_gate


def test_a_worker_waits_at_a_rung_until_that_rung_is_opened(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with ThreadPoolExecutor(1) as workers:
        open_gate(folder, 30)
        assert workers.submit(wait_at_gate, folder, 30).result(10)
        waiting = workers.submit(wait_at_gate, folder, 60)
        with pytest.raises(NotYet):
            waiting.result(0.2)
        open_gate(folder, 60)
        assert waiting.result(10)
        # One that is started again passes the earlier rungs at once.
        assert workers.submit(wait_at_gate, folder, 30).result(10)
        waiting = workers.submit(wait_at_gate, folder, 90)
        close_gate(folder, 90)
        assert not waiting.result(10)
        forget_gate(folder)
        waiting = workers.submit(wait_at_gate, folder, 30)
        with pytest.raises(NotYet):
            waiting.result(0.2)
        open_gate(folder, 30)
        assert waiting.result(10)


def test_the_driver_sees_at_which_rung_a_trial_stands(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert knocked(folder) is None
    knock(folder, 30, 2.5)
    assert knocked(folder) == (30, 2.5)
    knock(folder, 60, math.inf)
    assert knocked(folder) == (60, math.inf)
    forget_gate(folder)
    assert knocked(folder) is None


def test_on_a_full_disk_both_sides_wait_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rung_gate, "_FULL_S", 0.05)
    folder = RunFolder(tmp_path)
    with ThreadPoolExecutor(1) as workers:
        with full_disk(5):
            standing = workers.submit(knock, folder, 30, 2.5)
            with pytest.raises(NotYet):
                standing.result(0.3)
            assert not open_gate(folder, 30)
            assert not close_gate(folder, 30)
            assert knocked(folder) is None
        standing.result(10)
    assert knocked(folder) == (30, 2.5)
    assert all("the trial waits at its rung" in message for message in caplog.messages)
    assert open_gate(folder, 30)
    assert wait_at_gate(folder, 30)
