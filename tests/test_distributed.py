import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed


def _sum_over_ranks(rank: int, world_size: int, x: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    total = x * rank
    torch.distributed.all_reduce(total)
    return rank, os.getpid(), total


def _rank_one_raises(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("this one")
    torch.distributed.barrier()


def _rank_one_stays_away(rank: int, world_size: int) -> None:
    # Only the collective that hangs is short of time: ranks may begin seconds apart.
    torch.distributed.barrier()
    group = torch.distributed.new_group(timeout=timedelta(seconds=2))
    if rank == 1:
        time.sleep(600)
    torch.distributed.barrier(group)


def _all_sleep(rank: int, world_size: int, folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def _rank_one_dies(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)
    torch.distributed.barrier()


def _rank_one_crashes(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(600)


def _environment(rank: int, world_size: int) -> str | None:
    return os.environ.get("OF_THE_CALLER")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_in_rank_order_and_processes_are_gone(world_size: int) -> None:
    results = run_distributed(_sum_over_ranks, world_size, torch.tensor([1.0, 2.0]))
    assert [rank for rank, _, _ in results] == list(range(world_size))
    pairs = world_size * (world_size - 1) / 2
    assert all(total.tolist() == [pairs, 2 * pairs] for _, _, total in results)
    assert len({pid for _, pid, _ in results}) == world_size
    assert not any(_is_alive(pid) for _, pid, _ in results)


def test_an_exception_is_raised_again_with_its_traceback() -> None:
    with pytest.raises(ValueError, match="this one") as caught:
        run_distributed(_rank_one_raises, 2)
    (note,) = caught.value.__notes__
    assert "on rank 1" in note
    assert "in _rank_one_raises" in note


def test_a_hanging_collective_fails() -> None:
    with pytest.raises(RuntimeError, match="Timed out"):
        run_distributed(_rank_one_stays_away, 2)


def test_a_hanging_function_is_ended(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"rank\(s\) \[0, 1\]"):
        run_distributed(_all_sleep, 2, tmp_path, timeout_s=4)
    pids = [int(file.name) for file in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(_is_alive(pid) for pid in pids)


def test_a_dead_rank_is_reported() -> None:
    with pytest.raises(RuntimeError, match="rank 1 died without a word, exit code 3"):
        run_distributed(_rank_one_dies, 2)


def test_a_rank_that_crashes_says_where() -> None:
    with pytest.raises(RuntimeError, match=f"rank 1 died without a word, exit code {-signal.SIGSEGV}") as caught:
        run_distributed(_rank_one_crashes, 2)
    (note,) = caught.value.__notes__
    assert "in _rank_one_crashes" in note


def test_ranks_see_the_environment_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_distributed(_environment, 1) == [None]
    monkeypatch.setenv("OF_THE_CALLER", "here")
    assert run_distributed(_environment, 1) == ["here"]
