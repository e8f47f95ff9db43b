from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path

import pytest

from pipelines.run_folder import RunFolder
from tuning.rung_gate import close_gate, forget_gate, open_gate, wait_at_gate


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
