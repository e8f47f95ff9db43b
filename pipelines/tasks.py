"""One function over many pieces of work, results in the order of the pieces: in this process, or as Ray tasks."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

from pipelines.ray_session import connect

Job = TypeVar("Job")
Item = TypeVar("Item")
Result = TypeVar("Result")

RAY_FROM_BYTES = 64 * 2**20
"""Work on less text than this is done in this process: starting Ray takes 5 s, which bytes need for 300 MB."""

# So many results may wait for a slower one before them, for every task at work; each holds the tokens of a piece.
_LEAD = 2


class Runner(Protocol):
    """Calls ``function(job, item)`` for every item; yields each item with its result, in order."""

    def __call__(
        self, function: Callable[[Job, Item], Result], job: Job, items: Iterable[Item], /
    ) -> Iterator[tuple[Item, Result]]:
        """Items are taken as they are needed, so that memory is bounded."""


@contextmanager
def runner(text_bytes: int, tasks: int | None = None) -> Iterator[Runner]:
    """The way to work on ``text_bytes`` of text.

    Args:
        text_bytes: about how much there is; little is done in this process.
        tasks: so many at a time, on Ray however little there is; None takes every CPU of the cluster.
    """
    if tasks is None and text_bytes < RAY_FROM_BYTES:
        yield in_this_process
        return
    with connect() as resources:
        # One more for each CPU waits there already when it is free.
        yield partial(_on_ray, tasks or 2 * max(1, int(resources.get("CPU", 1))))


def in_this_process(
    function: Callable[[Job, Item], Result], job: Job, items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """The plain loop."""
    for item in items:
        yield item, function(job, item)


def _on_ray(
    at_once: int, function: Callable[[Job, Item], Result], job: Job, items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    import ray

    remote = ray.remote(num_cpus=1)(_single_threaded)
    shared = ray.put((function, job))
    source = iter(items)
    begun: deque[tuple[Item, Any]] = deque()
    unfinished: list[Any] = []
    more = True
    try:
        while begun or more:
            while more and len(unfinished) < at_once and len(begun) < _LEAD * at_once:
                try:
                    item = next(source)
                except StopIteration:
                    more = False
                    break
                reference = remote.remote(shared, item)
                begun.append((item, reference))
                unfinished.append(reference)
            if unfinished:
                _, unfinished = ray.wait(unfinished, num_returns=1, fetch_local=False)
            while begun and begun[0][1] not in unfinished:
                item, reference = begun.popleft()
                yield item, ray.get(reference)
    finally:
        for _, reference in begun:
            ray.cancel(reference, force=True)


def _single_threaded(shared: tuple[Callable[[Job, Item], Result], Job], item: Item) -> Result:
    """What a task does: it has one CPU, so the tokenizer library shall not take all."""
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    function, job = shared
    return function(job, item)
