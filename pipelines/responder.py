"""What is done about spikes while training runs: every rank has one, and all come to the same answer.

Before an update is taken the responder looks at the step, and refuses the update of one that went wrong. After the step
it carries out the rest: the event is written down, then the journal, and then training goes back, if it does.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from moe.fsdp import release_gathered
from moe.hooks import Seen, StepHook
from moe.report import Report
from moe.schedule import Moment
from moe.snapshots import SnapshotMemoryError, SnapshotRing
from moe.trainer import Trainer
from pipelines.data import TrainBatches
from pipelines.errors import UserError
from pipelines.event_making import describe_step, in_words, is_conspicuous, kind_of
from pipelines.first_rank import from_first_rank
from pipelines.journal import Journal, LrCut, OpenEvent, SkippedSamples
from pipelines.keeper import CheckpointKeeper
from pipelines.ladder import Answer, answer, is_relapse
from pipelines.notes import Note, add_note
from pipelines.outcome import Ending
from pipelines.response_config import LadderResponseConfig, ResponseConfig
from pipelines.run_folder import RunFolder
from pipelines.spike_event import Kind, SpikeEvent, State, add_event, add_outcome, event_id

# Steps of which it is remembered how long they took; a rewind that goes farther back costs more time than it says.
_TIMED_STEPS = 1000


@dataclass(frozen=True)
class Response:
    """What a step that went wrong has led to."""

    rewound_to: int | None = None
    """Optimizer steps done in the state that training went back to."""
    ending: Ending | None = None
    """The run is over."""


@dataclass(frozen=True)
class _Pending:
    """An event between the decision on its update and the end of its step."""

    kind: Kind
    onset: int
    words: str
    answer: Answer


@dataclass(frozen=True)
class _Done:
    """What an answer has come to."""

    words: str
    steps_lost: int
    """By it alone: a step that had been refused before it was taken back counts with the refusal."""
    rewound_to: int | None = None


class Responder(StepHook):
    """Answers spikes by ``response``. All methods are collective."""

    def __init__(
        self,
        config: ResponseConfig,
        trainer: Trainer,
        batches: TrainBatches,
        keeper: CheckpointKeeper,
        folder: RunFolder,
    ) -> None:
        """For a trainer whose state has been taken up or is that of its start.

        Raises:
            UserError: the snapshots do not fit into the memory that the config gives them, or the journal is damaged.
        """
        self._config, self._trainer, self._batches = config, trainer, batches
        self._keeper, self._folder = keeper, folder
        self._leads = trainer.ranks.rank == 0
        self.journal = from_first_rank(trainer.ranks, lambda: Journal.read(folder.journal))
        for skipped in self.journal.skipped_samples:
            batches.skip(skipped.samples, skipped.from_step)
        if self.journal.last_event_step is not None:
            keeper.restart_confirmation(self.journal.last_event_step)
        self._ring: SnapshotRing | None = None
        if isinstance(config, LadderResponseConfig):
            try:
                self._ring = SnapshotRing(trainer.state, config.snapshots, config.memory_gib * 2**30)
            except SnapshotMemoryError as error:
                raise UserError(
                    f"response.memory_gib: {error}; raise it, or lower response.snapshots, or set response.kind=record"
                ) from error
            self._ring.take(trainer.steps_done)
        self._pending: _Pending | None = None
        self._onset: int | None = None
        self._seconds: deque[tuple[int, float]] = deque(maxlen=_TIMED_STEPS)

    @property
    def at_spike(self) -> bool:
        """Whether the step that has just been done is an event."""
        return self._pending is not None

    def before_step(self, moment: Moment) -> None:
        """Drop what was made of batches that are others now, and anticipate, from where an answer says so."""
        if any(skipped.rewound_to == moment.step for skipped in self.journal.skipped_samples):
            self._trainer.forget_batches()
        if moment.step in self.journal.anticipated_from:
            self._trainer.anticipate()

    def lr_factor(self, moment: Moment) -> float:
        """What answers have imposed."""
        return self.journal.lr_factor(moment.step)

    def takes(self, seen: Seen) -> bool:
        """Decide on a step's update."""
        if (known := self.journal.decisions.get(seen.step)) is not None:
            return known == "record"  # a resumed run repeats it
        self._onset = (self._onset or seen.step) if is_conspicuous(seen) else None
        kind = kind_of(seen)
        if kind is None or self._onset is None:
            return True
        found = answer(self._config, self.journal, kind, seen.step)
        self._pending = _Pending(kind, self._onset, in_words(kind, seen), found)
        self.journal.events += 1
        return found.action == "record"

    def see_update(self, report: Report) -> None:
        """Look at the update of a step that was taken: one that is not finite has spoiled weights.

        Loss and gradient were finite; a weight with a flipped bit does that, for instance.
        """
        update = report.metrics.get("train/update_norm", 0.0)
        if self._pending is None and not math.isfinite(update):
            found = answer(self._config, self.journal, "non_finite", report.step, is_taken=True)
            words = f"step {report.step}: the update of the weights is not finite"
            self._pending = _Pending("non_finite", self._onset or report.step, words, found)
            self.journal.events += 1

    def after_step(self, report: Report, seconds: float) -> Response:
        """Carry out what was decided, and keep account of what is over."""
        self._seconds.append((report.step, seconds))
        pending, self._pending = self._pending, None
        if pending is None:
            self._settle_if_calm(report.step)
            every = self._config.snapshot_every_steps if isinstance(self._config, LadderResponseConfig) else 0
            if self._ring is not None and report.step % every == 0:
                self._ring.take(report.step)
            return Response()
        self._close_open("relapsed" if self._belongs(report.step) else "recovered", report.step)
        return self._carry_out(pending, report)

    def finish(self) -> None:
        """The run ends: what has not been settled stays open."""
        if self.journal.open:
            self._close_open("open", self._trainer.steps_done)
            self._write_journal()

    def _carry_out(self, pending: _Pending, report: Report) -> Response:
        journal, step, found = self.journal, report.step, pending.answer
        identity = event_id(pending.kind, step, len(journal.rewinds))
        # Before training goes back, which discards checkpoints and changes batches.
        known = self._facts(pending, report, identity) if self._leads else {}
        done = self._go_back(pending, step) if found.goes_back else self._stay(pending, step)
        journal.last_event_step = max(step, journal.last_event_step or 0)
        journal.rung = found.next_rung
        event = OpenEvent(
            id=identity, step=step, steps_lost=done.steps_lost, seconds_lost=self._time_of(done.steps_lost)
        )
        aborted = found.action == "abort"
        if not aborted:
            journal.open.append(event)
        if self._leads:
            detail = f"{pending.words}; {done.words}"
            outcome = event.outcome("aborted" if aborted else "open", step)
            add_event(
                self._folder.events,
                SpikeEvent(**known, detail=detail, rewound_to=done.rewound_to, outcome=outcome),
            )
            add_note(self._folder.notes, Note("spike", detail))
        # Before the journal: a worker that is killed in between answers the same spike again, from an older checkpoint.
        if done.rewound_to is not None:
            self._keeper.go_back(done.rewound_to)
        self._write_journal()
        if aborted:
            self._keeper.condemn(identity)
            return Response(ending=Ending("diverged", step, found.reason))
        self._keeper.restart_confirmation(step)
        return Response(rewound_to=done.rewound_to)

    def _facts(self, pending: _Pending, report: Report, identity: str) -> dict[str, Any]:
        """The fields of the event that are known before anything is done about it. On rank 0."""
        documents = self._batches.documents(report.step - 1)
        names = dict.fromkeys(span.name for spans in documents.values() for span in spans)
        return describe_step(self._trainer, pending.kind, report) | {
            "id": identity,
            "timeline": len(self.journal.rewinds),
            "tokens_seen": self._trainer.timeline.tokens_before(report.step - 1),
            "onset": pending.onset,
            "samples": tuple(documents),
            "documents": tuple(names),
            "action": pending.answer.action,
            "checkpoint": self._keeper.pin(pending.onset - 1, identity),
        }

    def _stay(self, pending: _Pending, step: int) -> _Done:
        """An answer that does not go back."""
        action = pending.answer.action
        if action == "abort":
            return _Done(f"the run ends: {pending.answer.reason}", 0)
        self.journal.decisions[step] = action
        if action == "record":
            return _Done("recorded", 0)
        self.journal.skipped_steps += 1
        return _Done("the step's update is refused", 1)

    def _go_back(self, pending: _Pending, step: int) -> _Done:
        """Restore an earlier state, and let the answer take effect from there."""
        assert isinstance(self._config, LadderResponseConfig)
        # What was read on the timeline that ends here, before anything of it is skipped.
        samples = [int(sample) for at in range(pending.onset - 1, step) for sample in self._batches.sample_ids(at)]
        target, where = self._restore(pending.onset - self._config.guard_steps)
        journal, words = self.journal, f"went back to step {target} ({where})"
        lost = step - target - sum(at > target for at, action in journal.decisions.items() if action == "skip_step")
        journal.go_back(target)
        self._onset = None
        if pending.answer.action == "rewind_skip_samples":
            self._batches.skip(samples, pending.onset - 1)
            skipped = SkippedSamples(from_step=pending.onset - 1, rewound_to=target, samples=samples)
            journal.skipped_samples.append(skipped)
            words += f" and left out the {len(samples)} samples of steps {pending.onset} to {step}"
        elif pending.answer.action == "rewind_anticipate":
            journal.anticipated_from.append(target)
            words += " and anticipates the choice of experts"
        elif pending.answer.action == "rewind_lower_lr":
            cut = LrCut(from_step=target, factor=self._config.lr_factor, rewarm_steps=self._config.rewarm_steps)
            journal.lr_cuts.append(cut)
            words += f" and multiplied the learning rate by {cut.factor:g}"
        return _Done(words, lost, target)

    def _restore(self, latest: int) -> tuple[int, str]:
        """Take up a state of at most ``latest`` steps done, or the best there is; its step, and where it was."""
        ring = self._ring
        assert ring is not None
        fitting = [step for step in ring.steps if step <= latest or step == 0]
        where = "in memory"
        if not fitting and self._keeper.restore_before(latest):
            ring.clear()
            ring.take(self._trainer.steps_done)
            return self._trainer.steps_done, "on the disk"
        if not fitting:
            fitting, where = ring.steps[:1], "in memory, less old than response.guard_steps wants"
        scalars: dict[str, Any] = ring.restore(fitting[-1])
        self._trainer.restore(scalars)
        release_gathered(self._trainer.model)
        return fitting[-1], where

    def _time_of(self, steps: int) -> float:
        """Seconds that the last ``steps`` steps took."""
        return round(sum(seconds for _, seconds in list(self._seconds)[len(self._seconds) - steps :]), 3)

    def _belongs(self, step: int) -> bool:
        return isinstance(self._config, LadderResponseConfig) and is_relapse(self._config, self.journal, step)

    def _settle_if_calm(self, step: int) -> None:
        if not self.journal.open or (isinstance(self._config, LadderResponseConfig) and self._belongs(step)):
            return
        self._close_open("recovered", step)
        self._write_journal()

    def _close_open(self, state: State, step: int) -> None:
        for event in self.journal.open:
            if self._leads:
                add_outcome(self._folder.events, event.id, event.outcome(state, step))
        self.journal.open.clear()

    def _write_journal(self) -> None:
        if self._leads:
            self.journal.write(self._folder.journal)
