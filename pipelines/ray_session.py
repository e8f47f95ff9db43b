"""The Ray cluster that a run uses: the one it is told of, or one of its own for as long as it runs."""

import logging
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from pipelines.addresses import place_of, silence_at
from pipelines.config import RunConfig
from pipelines.errors import UserError, first_line

# Must be set before ray is imported. Nothing here overrides what the user has set.
QUIET_AND_QUICK = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # How often Ray Train looks at its workers, and so how late it sees that they are done; 2 s otherwise.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Processes and threads of Ray Train that a run here has no use for: about 1 s of a core each at the start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Threads that outlive their session must fail: Ray would start a cluster for them.
    "RAY_ENABLE_AUTO_CONNECT": "0",
}

# Despite its name it counts on Linux too: with 0, a Ray cluster on one machine binds the loopback interface alone.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

# Keeps the heap: glibc returns every block over 32 MiB to the system, and each step would fault its pages in anew.
_KEPT_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def set_defaults(further: Mapping[str, str] = MappingProxyType({})) -> None:
    """Put `QUIET_AND_QUICK` and ``further`` into this process's environment, where the user has not set them."""
    for name, value in {**QUIET_AND_QUICK, **further}.items():
        os.environ.setdefault(name, value)


def worker_environment(config: RunConfig) -> dict[str, str]:
    """Environment variables of the training workers."""
    return {**_KEPT_HEAP, "OMP_NUM_THREADS": str(config.parallel.threads)}


@contextmanager
def connect(environment: Mapping[str, str] | None = None) -> Iterator[dict[str, float]]:
    """Connect to the cluster of ``RAY_ADDRESS`` (a submitted job has it), or start one on this machine for the while.

    A process that is connected already stays so. Yields the cluster's resources.

    Args:
        environment: variables of every worker process; None where those that need some are started with them.

    Raises:
        UserError: no cluster answers at ``RAY_ADDRESS``.
    """
    address = os.environ.get("RAY_ADDRESS")
    set_defaults({} if address else LOOPBACK)
    import ray

    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    runtime = {"env_vars": dict(environment)} if environment else None
    # Workers' output stays in Ray's own logs: what a run has to say comes through its spool, and what went wrong
    # through the exception.
    with own_sigterm():
        if address:
            _refuse_silent(address)
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise _no_cluster(address, first_line(error)) from error
        else:
            # Without "local", Ray would join any cluster that someone started on this machine.
            ray.init(
                "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime
            )
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Keep the process's own handler of SIGTERM: ``ray.init`` sets one that ends it with code 15 and no word.

    Without an own one Ray's stays, for otherwise its processes would be left behind.
    """
    own = signal.getsignal(signal.SIGTERM)
    if not callable(own):
        yield
        return
    try:
        yield
    except SystemExit as ended:
        if ended.code == signal.SIGTERM:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGTERM, own)


@contextmanager
def ray_session(config: RunConfig, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """The cluster for a run; ``environment`` as for `connect`.

    Raises:
        UserError: the cluster cannot hold the workers, or does not answer.
    """
    with connect(environment) as resources:
        _check_room(config, resources)
        yield


def runs_at_a_time(config: RunConfig) -> int:
    """How many runs of this size the cluster holds side by side, at least 1. Needs a session."""
    import ray

    resources, parallel = ray.cluster_resources(), config.parallel
    fit = [resources.get("CPU", 0.0) // (parallel.workers * parallel.threads)]
    if uses_gpu(config):
        fit.append(resources.get("GPU", 0.0) // parallel.workers)
    return max(1, int(min(fit)))


def refuse_impossible_cluster(config: RunConfig) -> None:
    """What no Ray cluster of its own could hold is refused before anything starts; so is a cluster that is not there.

    Ray may find less, in a container for instance: `ray_session` asks it.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        _refuse_silent(address)
    else:
        _check_cpus(config, os.cpu_count() or 1, "this machine")


def _refuse_silent(address: str) -> None:
    """Find out in a moment what Ray finds out after minutes."""
    place = place_of(address)
    if place and (why := silence_at(place)) is not None:
        raise _no_cluster(address, why)


def _no_cluster(address: str, why: str) -> UserError:
    return UserError(
        f"RAY_ADDRESS: no Ray cluster answers at {address} ({why}); unset it, or start one with steadymoe up"
    )


def _check_cpus(config: RunConfig, cpus: float, where: str) -> None:
    parallel = config.parallel
    needed = parallel.workers * parallel.threads
    if needed > cpus:
        raise UserError(
            f"parallel.workers ({parallel.workers}) x parallel.threads ({parallel.threads}) needs {needed} CPUs, "
            f"but {where} has {cpus:.0f}"
        )


def _check_room(config: RunConfig, resources: dict[str, float]) -> None:
    parallel = config.parallel
    _check_cpus(config, resources.get("CPU", 0.0), "the Ray cluster")
    if uses_gpu(config) and parallel.workers > resources.get("GPU", 0.0):
        raise UserError(
            f"parallel.workers ({parallel.workers}) needs a GPU each, but the Ray cluster has "
            f"{resources.get('GPU', 0.0):.0f}; set parallel.device=cpu or fewer workers"
        )


def uses_gpu(config: RunConfig) -> bool:
    """Whether each worker gets a GPU: asked for, or there are any and the CPU was not asked for. Needs a session."""
    import ray

    device = config.parallel.device
    return device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0.0) > 0)
