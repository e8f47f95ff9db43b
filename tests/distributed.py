"""Runs a function on several ranks of a gloo process group on this machine.

Every call has fresh processes, so nothing leaks from one test into the next. They are forked from a server that has
imported torch and the model already: a call with two ranks costs about 0.1 s and the imports of its test module, where
starting two interpreters that import torch costs 4 s on two cores. (Forking pytest's own process would copy locks that
its threads hold.)
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# torch._dynamo because the first DTensor imports it, in 1.5 s; moe.trainer takes 0.3 s, pipelines.loop 0.2 s more.
_PRELOAD = [
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "moe.trainer",
    "pipelines.loop",
]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_PRELOAD)


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120, collective_timeout_s: float = 60
) -> list[Any]:
    """Calls ``fn(rank, world_size, *args)`` on every rank and returns the results in rank order.

    Arguments:
        fn: a function at the top level of an importable module.
        args: picklable. Tensors are copied.
        timeout_s: the whole call, in seconds.
        collective_timeout_s: a single collective, and the meeting of the ranks; shorter, so that a hang names its line.

    In ``fn`` the default process group is up (gloo over the loopback device) and torch uses one thread. Environment
    variables are those of the caller at the time of the call. A plain tensor is a good result, a DTensor is not.

    Raises the first exception of any rank, with that rank's traceback as a note; TimeoutError; RuntimeError if a rank
    dies, with its exit code and what its threads were at, if a signal has killed it. The processes are gone in each
    case.
    """
    task = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory(prefix="gloo-") as folder:
        processes, connections = [], []
        try:
            for rank in range(world_size):
                ours, theirs = _CONTEXT.Pipe()
                process = _CONTEXT.Process(
                    target=_rank_main,
                    args=(
                        rank,
                        world_size,
                        Path(folder),
                        collective_timeout_s,
                        dict(os.environ),
                        task,
                        theirs,
                    ),
                    daemon=True,
                )
                process.start()
                theirs.close()
                processes.append(process)
                connections.append(ours)
            return _collect(connections, time.monotonic() + timeout_s, timeout_s)
        except _RankDiedError as death:
            processes[death.rank].join(10)
            error = RuntimeError(f"rank {death.rank} died without a word, exit code {processes[death.rank].exitcode}")
            if (words := _last_words(Path(folder), death.rank)).exists():
                error.add_note(words.read_text())
            raise error from None
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for connection in connections:
                connection.close()


class _RankDiedError(Exception):
    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.rank = rank


def _last_words(folder: Path, rank: int) -> Path:
    """Where a rank that a signal kills says what its threads were at."""
    return folder / f"rank-{rank}.txt"


def _collect(connections: list[Connection], deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        waiting: dict[Any, int] = {connections[rank]: rank for rank in range(len(connections)) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"no result from rank(s) {sorted(waiting.values())} after {timeout_s} s")
        for connection in ready:
            rank = waiting[connection]
            result, error, trace = _message_of(connection, rank)
            if error is not None:
                # Of a rank that died, the others say only that a connection ended.
                others = [other for other in waiting if other is not connection]
                for other in multiprocessing.connection.wait(others, timeout=0):
                    _message_of(other, waiting[other])
                error.add_note(f"\non rank {rank}:\n{trace}")
                raise error
            results[rank] = result
    return [results[rank] for rank in range(len(connections))]


def _message_of(connection: Any, rank: int) -> tuple[Any, BaseException | None, str]:
    """Result, error and traceback."""
    try:
        message: tuple[Any, BaseException | None, str] = pickle.loads(connection.recv_bytes())
    except EOFError:
        raise _RankDiedError(rank) from None
    return message


def _rank_main(
    rank: int,
    world_size: int,
    folder: Path,
    collective_timeout_s: float,
    environment: dict[str, str],
    task: bytes,
    connection: Connection,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    # Open for as long as this process lives: the handler writes to its descriptor.
    words = _last_words(folder, rank).open("w")
    faulthandler.enable(words)
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=collective_timeout_s),
        )
        fn, args = pickle.loads(task)
        message = pickle.dumps((fn(rank, world_size, *args), None, ""))
    except BaseException as error:  # noqa: BLE001  (the parent raises it; pytest's failures are no Exceptions)
        message = pickle.dumps((None, _picklable(error), traceback.format_exc()))
    connection.send_bytes(message)
    # Stay until killed: an early exit would break the collectives of slower ranks, whose error would hide this one's.
    # The pipe ends if the parent dies.
    connection.poll(None)
    os._exit(0)


def _picklable(error: BaseException) -> BaseException:
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  (any class may fail to be copied, in its own way)
        copy = None
    return copy if isinstance(copy, BaseException) else RuntimeError(f"{type(error).__name__}: {error}")
