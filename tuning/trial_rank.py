"""One rank of a trial, in a process that outlives it: trials follow each other in the same processes."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from moe.parallel import Ranks, choose_device, join
from pipelines.checkpoint_adoption import adopt
from pipelines.checkpoint_manifest import checkpoint_folders
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.keeper import StartingPoint
from pipelines.loop import StepDone, Steps, train_steps
from pipelines.outcome import Ending
from pipelines.run_folder import RunFolder
from pipelines.shards import open_shards
from tuning.blow_up import BlowUp
from tuning.recording import SeriesRecorder, first_loss, series_file


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
    rungs: NotRequired[list[int]]
    """Optimizer steps at which it is compared with others: its config must validate there."""
    end_early: NotRequired[bool]
    """Whether it ends as diverged when its loss has risen far above the first, though it is finite."""
    values: NotRequired[dict[str, Any]]
    """Its point of a sweep's space, by dotted keys; its config has them already."""
    take_over: NotRequired[str]
    """Folder of another trial's checkpoint, in place of its own from there on: `pipelines.checkpoint_adoption`."""


@dataclass(frozen=True)
class Progress:
    """Where a trial is; the same on every rank."""

    step: int
    """Optimizer steps done."""
    ending: Ending | None = None
    """How it ended, if it has."""
    rung_loss: float | None = None
    """The validation loss, nats per token, if it stands at a rung."""


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
        self._rungs: frozenset[int] = frozenset()
        self._watch: BlowUp | None = None

    def begin(self, job: TrialJob) -> None:
        """Drop what there was, and be ready for the first step of another trial. Collective."""
        self.close()
        reset_process()
        config = RunConfig.model_validate(job["config"])
        self._folder = RunFolder(Path(job["run_folder"]))
        self._step, self._schedule_steps = 0, config.steps
        self._until = job.get("until_step", config.steps)
        self._rungs = frozenset(job.get("rungs", ()))
        self._watch = BlowUp(first_loss(self._folder)) if job.get("end_early") else None
        if "take_over" in job and self.rank == 0:
            adopt(self._folder.checkpoints, Path(job["take_over"]))
        ranks, shards = self._ranks_for(config), open_shards(Path(job["shards"]))
        start = StartingPoint(Path(job["checkpoint"]), tuple(job.get("fresh", ()))) if "checkpoint" in job else None
        init_from = Path(job["init_from"]) if "init_from" in job else None
        self._steps = train_steps(config, ranks, shards, self._folder, init_from, start)

    def advance(self, steps: int) -> Progress:
        """Take so many steps, or fewer to the next rung or the trial's end. Collective.

        What the user gave and training cannot use is an ending, as with `pipelines.worker`.
        """
        assert self._steps is not None, "begin comes first"
        for _ in range(steps):
            try:
                done = next(self._steps)
                self._take(done)
            except StopIteration as end:
                return self._end(end.value)
            except UserError as error:
                return self._end(Ending("refused", self._step, str(error)))
            if self._watch is not None and (reason := self._watch.see(done.report.metrics["train/loss"])):
                return self._end(Ending("diverged", self._step, reason))
            if self._step == self._until < self._schedule_steps:
                return self._end(Ending("finished", self._step))
            if self._step in self._rungs and done.validation is not None:
                return Progress(self._step, rung_loss=done.validation["val/loss"])
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

    def newest_checkpoint(self) -> Path | None:
        """That of the run's folder; None without one."""
        paths = checkpoint_folders(self._folder.checkpoints) if self._folder is not None else []
        return paths[-1] if paths else None

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
    # What is left, the modules of torch and Ray above all, lives as long as the process. To go through it again took
    # 0.17 of the 0.2 s that a trial costs its ranks besides the steps.
    gc.freeze()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
