"""A training run as a Ray Tune trial, in actors that are kept from trial to trial.

The trial's actor is rank 0. The other ranks are its child actors, each on a bundle of the trial's own placement group,
so that Tune starts, restarts and ends the gang as one. Nested Ray Train runs would start eight processes a trial, some
12 s; here the first trial of a slot pays for its processes, and the next ones begin within a tenth of a second.
"""

import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray import tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moe.config.trainer import ParallelConfig
from pipelines.config import RunConfig
from pipelines.process_group import join_group, serve_store
from tuning.trial_rank import Progress, TrialJob, TrialRank

JOB = "job"
"""Key of a trial's config under which its `TrialJob` is."""
RUNG_LOSS = "rung_loss"
"""Key of a result, only where a trial stands at one of its rungs: the validation loss, finite."""
DIVERGED_LOSS = 1e3
"""What stands for a validation loss that is not finite: more than any that is, for guessing costs the logarithm of the
vocabulary, and schedulers take NaN for the best."""
_CHECKPOINT = "checkpoint"

# A collective that takes longer has lost a rank; a dead one is noticed at once, a hung one is not.
_COLLECTIVE_TIMEOUT = timedelta(seconds=300)
_PEER_TIMEOUT_S = 600.0
# How long the actor is out of reach: Tune asks for the next result, or for the end, only then.
_REPORT_EVERY_S = 1.0
_MOST_STEPS = 1000


def resources(parallel: ParallelConfig, gpu: bool) -> tune.PlacementGroupFactory:
    """What a trial occupies: a bundle for every rank, none for anybody else."""
    bundle = {"CPU": parallel.threads, **({"GPU": 1} if gpu else {})}
    return tune.PlacementGroupFactory([bundle] * parallel.workers)


def trial_result(progress: Progress) -> dict[str, Any]:
    """What Tune is told of where a trial is."""
    ending = progress.ending
    result: dict[str, Any] = {
        "step": progress.step,
        "outcome": ending.outcome if ending else None,
        "reason": ending.reason if ending else None,
        "done": ending is not None,
    }
    if progress.rung_loss is not None:
        result[RUNG_LOSS] = progress.rung_loss if math.isfinite(progress.rung_loss) else DIVERGED_LOSS
    return result


class Peer:
    """Rank 1 and above, as a child actor of rank 0's."""

    def __init__(self, rank: int) -> None:
        self._rank = TrialRank(rank)

    def join(self, backend: str, address: tuple[str, int], size: int) -> None:
        """Meet the other ranks."""
        join_group(backend, address, self._rank.rank, size, _COLLECTIVE_TIMEOUT)

    def begin(self, job: TrialJob) -> None:
        """`TrialRank.begin`."""
        self._rank.begin(job)

    def advance(self, steps: int) -> Progress:
        """`TrialRank.advance`."""
        return self._rank.advance(steps)


class TrainingTrial(tune.Trainable):  # type: ignore[misc]
    """Trains one trial after the other. All trials of a `Tuner` must have the same ``parallel.workers``.

    Tune's own checkpoints are but the places of those in the run's folder, where a restarted trial finds its state; a
    trial that is given another's takes it over.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Start the ranks."""
        self._rank = TrialRank(0)
        self._peers: list[Any] = []
        self._stride, self._step = 1, 0
        parallel = RunConfig.model_validate(config[JOB]["config"]).parallel
        if parallel.workers > 1:
            self._gather(parallel)
        self._next: TrialJob | None = config[JOB]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another trial in the same processes. It begins with its first step: Tune restarts no trial that fails here,
        for instance because a peer died meanwhile."""
        self._rank.close()
        self._next = new_config[JOB]
        return True

    def step(self) -> dict[str, Any]:
        """About a second of training. Tune may end the trial between two of these, when no rank waits for another."""
        if self._next is not None:
            self._begin(self._next)
            self._next = None
        started = time.perf_counter()
        steps = self._stride
        waiting = [peer.advance.remote(steps) for peer in self._peers]
        before = self._step
        progress = self._rank.advance(steps)
        ray.get(waiting, timeout=_PEER_TIMEOUT_S)
        self._step = progress.step
        # A rung may cut a stride short.
        taken, steps = time.perf_counter() - started, max(1, min(steps, progress.step - before))
        # At most doubled: the first step of a process takes a second or two more than the others.
        self._stride = max(1, min(2 * steps, round(steps * _REPORT_EVERY_S / max(taken, 1e-6)), _MOST_STEPS))
        return trial_result(progress)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Where the run's newest state is."""
        path = self._rank.newest_checkpoint()
        return {_CHECKPOINT: str(path) if path is not None else None}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Go on from there. A trial whose own state it is finds it by itself."""
        path = (checkpoint or {}).get(_CHECKPOINT)
        if path is None or self._next is None:
            return
        job = self._next.copy()
        # What it took over when it was begun lies behind its own state.
        job.pop("take_over", None)
        if not Path(path).is_relative_to(job["run_folder"]):
            job["take_over"] = path
        self._next = job

    def cleanup(self) -> None:
        """Free the run's locks and end the ranks."""
        self._rank.close()
        for peer in self._peers:
            ray.kill(peer)
        if dist.is_initialized():
            dist.destroy_process_group()

    def _begin(self, job: TrialJob) -> None:
        self._stride, self._step = 1, 0
        waiting = [peer.begin.remote(job) for peer in self._peers]
        self._rank.begin(job)
        ray.get(waiting, timeout=_PEER_TIMEOUT_S)

    def _gather(self, parallel: ParallelConfig) -> None:
        """Start the other ranks and meet them."""
        group = ray.util.get_current_placement_group()
        gpus = ray.get_gpu_ids()
        for rank in range(1, parallel.workers):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            actor = ray.remote(Peer).options(
                num_cpus=parallel.threads, num_gpus=1 if gpus else 0, scheduling_strategy=place
            )
            self._peers.append(actor.remote(rank))
        backend, size, host = "nccl" if gpus else "gloo", parallel.workers, ray.util.get_node_ip_address()
        address = (host, serve_store(host, size, _COLLECTIVE_TIMEOUT))
        waiting = [peer.join.remote(backend, address, size) for peer in self._peers]
        join_group(backend, address, 0, size, _COLLECTIVE_TIMEOUT)
        ray.get(waiting, timeout=_PEER_TIMEOUT_S)
