"""The trials of a sweep while they run: what Tune is given, what MLflow is told, what the journal remembers."""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pipelines.checkpoint_manifest import checkpoint_folders, step_name, step_of
from pipelines.config import RunConfig
from pipelines.description import Status
from pipelines.errors import UserError
from pipelines.home import runs_dir
from pipelines.notes import Note, add_note
from pipelines.outcome import Ending
from pipelines.run_folder import RunFolder, read_json
from pipelines.shards import Shards
from pipelines.text import fit_to_text
from pipelines.tracking_store import TrackingStore
from pipelines.views import run_colour
from tuning.objective import LOSS, figures
from tuning.outcome import measure_pruned, measure_trial
from tuning.space_config import Values
from tuning.sweep_journal import Again, Begun, Ended, Exploit, Rung, SweepJournal, TrialOutcome
from tuning.sweep_loading import SweepPlan, trial_config
from tuning.sweep_queue import SweepQueue
from tuning.sweep_run import SweepRun
from tuning.trial_rank import TrialJob
from tuning.trial_runs import TrackedTrial, TrialRuns
from tuning.trials import TrialSource

_STATUS: dict[TrialOutcome, Status] = {
    "finished": "FINISHED",
    "pruned": "KILLED",
    "diverged": "FAILED",
    "failed": "FAILED",
}
# MLflow's limit.
_TAG_LENGTH = 8000
# So many that fail in a row, or before any has ended well, are no accident.
_FAILURES = 3


class SweepTrials(TrialSource):
    """The `tuning.trials.TrialSource` of a sweep."""

    def __init__(
        self,
        plan: SweepPlan,
        run: SweepRun,
        queue: SweepQueue,
        shards: Shards,
        store: TrackingStore,
        stop: threading.Event,
        concurrent: int,
        steps: dict[str, int],
        on_end: Callable[[str, Ended], None],
    ) -> None:
        """
        Args:
            plan: the sweep.
            run: the parent of its trials.
            queue: which trial comes next.
            shards: the text of all trials.
            store: where trials are recorded.
            stop: set when the sweep must end early.
            concurrent: trials at a time, at most.
            steps: kept up to date for whoever shows it: how far the trials are that run, by name.
            on_end: called with each trial that is over.
        """
        self._plan, self._run, self._queue, self._shards = plan, run, queue, shards
        self._stop, self._concurrent, self._on_end = stop, concurrent, on_end
        self._journal: SweepJournal = run.journal
        known = self._journal.trials.values()
        self._unfinished = [trial.begun for trial in known if trial.ended is None]
        # What was wrong with the machine may be mended by now.
        self._failed = [trial.begun for trial in known if trial.ended and trial.ended.outcome == "failed"]
        self._resumed = frozenset(begun.name for begun in (*self._unfinished, *self._failed))
        self._tracked: dict[str, TrackedTrial] = {}
        self._started: dict[str, float] = {}
        self._steps = steps
        self._runs = TrialRuns(store, shards, run.info.id)
        self._ending = self._saving = False
        self._in_a_row = 0
        self.failure: Exception | None = None
        """Why the sweep cannot go on: a UserError if the config is the reason."""
        for trial in self._journal.trials.values():
            ending = read_json(RunFolder(Path(trial.begun.folder)).ending)
            if trial.ended is not None and "outcome" not in ending.get("tags", {}):
                # The driver was killed between its own record and MLflow's; another may have found the run an orphan.
                self._track(trial.begun)
                self._tell_end(self._tracked.pop(trial.begun.name), trial.ended)

    @property
    def untold(self) -> list[str]:
        """Trials that MLflow could not be told of."""
        return self._runs.untold

    def next(self) -> tuple[str, TrialJob] | Literal["wait", "end"]:
        """The next trial."""
        if self._ending:
            return "end"
        while self._unfinished and self._was_stopped(self._unfinished[0].name):
            # Killed between the scheduler's word and the trial's end.
            begun = self._unfinished.pop(0)
            self._track(begun)
            self._over(begun.name, "pruned", None)
        if len(self._tracked) >= self._concurrent:
            return "wait"
        if self._unfinished:
            begun = self._unfinished.pop(0)
            return begun.name, self._job(begun)
        if self._failed:
            begun = self._failed.pop(0)
            self._journal.add(Again(begun.name))
            return begun.name, self._job(begun)
        match self._queue.next():
            case "wait" | "end" as word:
                return word
            case wanted:
                name = f"{self._run.info.name}-{wanted.number:02d}"
                name = name if self._only_seed(wanted.seed) else f"{name}-s{wanted.seed}"
                folder = runs_dir() / f"{self._run.info.id}-{name.removeprefix(self._run.info.name + '-')}"
                begun = Begun(name, wanted.number, wanted.seed, wanted.values, wanted.phase, str(folder))
                self._journal.add(begun)
                return begun.name, self._job(begun)

    def begin_no_more(self) -> None:
        """Hand out no further trial."""
        self._ending = True

    def save_and_stop(self) -> None:
        """Ask the trials that run to save and to stop where they are, and hand out no other."""
        self.begin_no_more()
        self._saving = True
        for tracked in list(self._tracked.values()):
            _ask_to_stop(tracked.folder)

    def _only_seed(self, seed: int) -> bool:
        return self._plan.config.seeds == 1 and seed == self._plan.first_seed

    def _was_stopped(self, name: str) -> bool:
        rungs = self._journal.trials[name].rungs
        return bool(rungs) and not rungs[-1].goes_on

    def started(self, name: str) -> None:
        """A trial has its actors, for the first time or again."""
        if name not in self._started:
            self._started[name] = time.monotonic()
            self._runs.started(self._tracked[name])

    def advanced(self, name: str, step: int) -> None:
        """A trial has done so many steps."""
        if name in self._tracked:
            if step:  # until then it is starting
                self._steps[name] = step
            if self._saving:
                # It may have been handed out in the moment when all were asked.
                _ask_to_stop(self._tracked[name].folder)

    def at_rung(self, rung: Rung) -> None:
        """The scheduler has said whether a trial goes on."""
        if rung.name not in self._tracked:
            return
        self._journal.add(rung)
        if not rung.goes_on:
            self._over(rung.name, "pruned", f"not among the best at the rung of step {rung.step}")

    def exploit(self, exploit: Exploit) -> TrialJob:
        """A trial goes on from another's state; what it is from then on."""
        self._journal.add(exploit)
        begun = self._journal.trials[exploit.name].begun
        values = self._plan.label(exploit.values)
        text = f"step {exploit.step}: goes on from the state of {exploit.donor} with {values}"
        add_note(RunFolder(Path(begun.folder)).notes, Note("exploit", text))
        return self._job_of(begun, exploit.values)

    def ended(self, name: str, ending: Ending) -> None:
        """A trial has come to its own end."""
        if name not in self._tracked:
            return  # it was pruned at its last step
        match ending.outcome:
            case "finished" | "diverged" as outcome:
                self._steps[name] = ending.step
                self._over(name, outcome, ending.reason)
            case "stopped":
                self._steps.pop(name, None)  # `save_and_stop`: it is not over
            case "failed":
                self._fail(name, RuntimeError(f"trial {name} failed: {ending.reason}"))
            case _:
                self._fail(name, UserError(f"trial {name}: {ending.reason}"))

    def failed(self, name: str, reason: str) -> None:
        """A trial's actors failed for good: the others go on."""
        if name in self._tracked:
            self._fail(name, RuntimeError(f"trial {name} failed: {reason}"))

    def close(self) -> None:
        """Tell MLflow of the trials that were left where they were, and wait until it knows everything."""
        for begun in self._unfinished:
            self._track(begun)
        for name, tracked in self._tracked.items():
            # One that was not taken up again in time is still as a killed driver has left it.
            if name not in self._started and tracked.folder.is_run:
                self._runs.started(tracked)
                self._started[name] = time.monotonic()
            if name in self._started:
                self._runs.ended(tracked, "KILLED", "the sweep was interrupted")
        self._tracked.clear()
        self._unfinished.clear()
        self._runs.close()

    def _fail(self, name: str, failure: Exception) -> None:
        self._over(name, "failed", str(failure))
        if name in self._resumed:
            return  # it may fail whenever it is begun, and the others are worth the try
        outcomes = [trial.ended.outcome for trial in self._journal.trials.values() if trial.ended]
        # Of a config that training cannot use there may be many in a space.
        self._in_a_row += isinstance(failure, RuntimeError)
        if self._in_a_row >= _FAILURES or (len(outcomes) >= _FAILURES and set(outcomes) == {"failed"}):
            self.failure = failure
            self._stop.set()

    def _over(self, name: str, outcome: TrialOutcome, reason: str | None) -> None:
        """A trial is done with."""
        if outcome != "failed":
            self._in_a_row = 0
        tracked, known = self._tracked.pop(name), self._journal.trials[name]
        step = known.rungs[-1].step if outcome == "pruned" else self._steps.get(name, known.step)
        self._steps.pop(name, None)
        if outcome == "pruned":
            measures = measure_pruned(tracked.folder, known.rungs[-1].loss)
        elif outcome == "failed":
            measures = {}
        else:
            measures = _measures(tracked.folder, tracked.config)
            if measures["diverged"] and outcome == "finished":
                outcome, reason = "diverged", "it ended above the loss before training"
        seconds = time.monotonic() - self._started.get(name, time.monotonic())
        ended = Ended(name, outcome, step, round(seconds, 2), measures, reason, name in self._resumed)
        self._journal.add(ended)
        self._tell_end(tracked, ended)
        self._on_end(self._plan.label(known.values), ended)

    def _tell_end(self, tracked: TrackedTrial, ended: Ended) -> None:
        tags = {"outcome": ended.outcome, **({"diverged": "true"} if ended.outcome == "diverged" else {})}
        exploits = self._journal.trials[ended.name].exploits
        if exploits:
            # MLflow never changes a parameter: what became of the values is a tag.
            told = (f"step {one.step} from {one.donor}: {self._plan.label(one.values)}" for one in exploits)
            tags["exploits"] = "; ".join(told)[:_TAG_LENGTH]
        found = figures(ended.measures, ended.step)
        self._runs.ended(tracked, _STATUS[ended.outcome], ended.reason, found, tags)

    def _job(self, begun: Begun) -> TrialJob:
        self._track(begun)
        RunFolder(Path(begun.folder)).stop.unlink(missing_ok=True)
        known = self._journal.trials[begun.name]
        job = self._job_of(begun, known.values)
        if known.exploits and (state := self._not_taken_over(begun, known.exploits[-1])) is not None:
            job["take_over"] = str(state)
        return job

    def _not_taken_over(self, begun: Begun, exploit: Exploit) -> Path | None:
        """The state that a trial was to go on from when the driver was killed; None if it has gone on since."""
        own = checkpoint_folders(RunFolder(Path(begun.folder)).checkpoints)
        donor = RunFolder(Path(self._journal.trials[exploit.donor].begun.folder))
        state = donor.checkpoints / step_name(exploit.step)
        return state if state.exists() and (not own or step_of(own[-1]) <= exploit.step) else None

    def _job_of(self, begun: Begun, values: Values) -> TrialJob:
        config = self._config(begun, values)
        job = TrialJob(
            config=config.model_dump(mode="json"),
            run_folder=begun.folder,
            shards=str(self._shards.folder),
            end_early=True,
            values=values,
        )
        if begun.phase == "search":
            job["rungs"] = list(self._plan.rungs)
        return job

    def _config(self, begun: Begun, values: Values) -> RunConfig:
        return fit_to_text(trial_config(self._plan, values, begun.seed), self._shards)

    def _track(self, begun: Begun) -> None:
        folder = RunFolder(Path(begun.folder))
        self._tracked[begun.name] = TrackedTrial(
            begun.name, self._config(begun, begun.values), folder, self._tags(begun)
        )

    def _tags(self, begun: Begun) -> dict[str, str]:
        return {
            "role": "sweep",
            "sweep": self._run.info.name,
            "configuration": self._plan.label(begun.values),
            "mlflow.runColor": run_colour(begun.number),
        }


def _ask_to_stop(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.stop.touch()


def _measures(folder: RunFolder, config: RunConfig) -> dict[str, float]:
    try:
        return measure_trial(folder, config)
    except ValueError:
        # Its first loss was not finite: it counts as a run that guesses, the worst that a loss can say.
        return {LOSS: math.log(config.model.vocab_size or 1), "diverged": 1.0}
