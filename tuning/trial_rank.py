"""One rank of a trial, in a process that outlives it: trials follow each other in the same processes."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from moe.parallel import Ranks, choose_device, join
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.keeper import StartingPoint
from pipelines.loop import StepDone, Steps, train_steps
from pipelines.outcome import Ending
from pipelines.run_folder import RunFolder
from pipelines.shards import open_shards
from tuning.recording import SeriesRecorder, series_file


class TrialJob(TypedDict):
    """What a trial is: plain values, since every process opens files for itself."""

    config: dict[str, Any]
    run_folder: str
    shards: str
    checkpoint: NotRequired[str]
    """Folder of a checkpoint that it begins with, of another run for instance; it begins at the start otherwise."""
    fresh: NotRequired[list[str]]
    """As of `pipelines.keeper.StartingPoint`."""
    init_from: NotRequired[str]
    """Folder of the weights that it begins with if there is no checkpoint."""
    until_step: NotRequired[int]
    """It ends after this optimizer step, although its schedule goes on."""


@dataclass(frozen=True)
class Progress:
    """Where a trial is; the same on every rank."""

    step: int
    """Optimizer steps done."""
    ending: Ending | None = None
    """How it ended, if it has."""


class TrialRank:
    """Trains its rank's part of one trial after the other. The default process group must be up for more than one."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._ranks: dict[tuple[int, int, str], Ranks] = {}
        self._steps: Steps | None = None
        self._step = 0
        self._schedule_steps = self._until = 0
        self._recorder: SeriesRecorder | None = None
        self._folder: RunFolder | None = None

    def begin(self, job: TrialJob) -> None:
        """Drop what there was, and be ready for the first step of another trial. Collective."""
        self.close()
        reset_process()
        config = RunConfig.model_validate(job["config"])
        self._folder = RunFolder(Path(job["run_folder"]))
        self._step, self._schedule_steps = 0, config.steps
        self._until = job.get("until_step", config.steps)
        ranks, shards = self._ranks_for(config), open_shards(Path(job["shards"]))
        start = StartingPoint(Path(job["checkpoint"]), tuple(job.get("fresh", ()))) if "checkpoint" in job else None
        init_from = Path(job["init_from"]) if "init_from" in job else None
        self._steps = train_steps(config, ranks, shards, self._folder, init_from, start)

    def advance(self, steps: int) -> Progress:
        """Take so many steps, or fewer to the trial's end. Collective.

        What the user gave and training cannot use is an ending, as with `pipelines.worker`.
        """
        assert self._steps is not None, "begin comes first"
        for _ in range(steps):
            try:
                self._take(next(self._steps))
            except StopIteration as end:
                return self._end(end.value)
            except UserError as error:
                return self._end(Ending("refused", self._step, str(error)))
            if self._step == self._until < self._schedule_steps:
                return self._end(Ending("finished", self._step))
        return Progress(self._step)

    def _take(self, done: StepDone) -> None:
        self._step = done.report.step
        if self.rank == 0:
            self._recording().add(done)

    def _end(self, ending: Ending) -> Progress:
        if self.rank == 0 and ending.outcome != "refused":
            assert self._folder is not None
            self._recording().series(ending.outcome).write(series_file(self._folder))
        self.close()
        return Progress(self._step, ending)

    def _recording(self) -> SeriesRecorder:
        """Not before the first step: until then a worker that was killed may still write there."""
        if self._recorder is None:
            assert self._folder is not None
            self._recorder = SeriesRecorder(self._folder, self._schedule_steps)
        return self._recorder

    def close(self) -> None:
        """Leave the trial where it is: its files are closed, and its locks are free."""
        if self._recorder is not None:
            self._recorder.close()
        if self._steps is not None:
            self._steps.close()
        self._steps = self._recorder = None

    def _ranks_for(self, config: RunConfig) -> Ranks:
        """Kept from trial to trial: gloo takes up to 0.7 s to set groups up again."""
        parallel = config.parallel
        key = (parallel.workers, parallel.expert_parallel, parallel.device)
        if key not in self._ranks:
            self._ranks[key] = join(parallel, choose_device(parallel))
        return self._ranks[key]


def reset_process() -> None:
    """Put back what one trial could leave behind for the next, so that A, B, A gives A bit for bit.

    Models and optimizers are not here: they are built anew. Nor is the number of threads, which the Trainer sets. A
    cycle of references would keep a whole model until the next collection.
    """
    gc.collect()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
