"""What has been done about spikes, and what that means for the steps to come. Imports no torch.

The journal is the one part of a run that a rewind does not touch. It is a file in the run's folder, written before the
step that it first matters to, so that a run that is killed and goes on from any checkpoint takes every step as it did
before: what has an effect on steps says from which step on.
"""

import logging
from pathlib import Path
from typing import Self

from pydantic import BaseModel, Field, ValidationError

from pipelines.errors import UserError
from pipelines.run_folder import read_json, write_json
from pipelines.spike_event import Action, SpikeOutcome, State

_log = logging.getLogger(__name__)


class SkippedSamples(BaseModel):
    """Samples that are not read any more."""

    from_step: int
    """Not from the batch of this step on (steps done before it)."""
    rewound_to: int
    """Steps done when that was decided: batches that were looked at before then are others now."""
    samples: list[int]


class LrCut(BaseModel):
    """A factor on the learning rate for good."""

    from_step: int
    """Steps done before the first step that it applies to."""
    factor: float
    rewarm_steps: int

    def at(self, step: int) -> float:
        """Factor of the step that follows ``step`` steps."""
        if step < self.from_step:
            return 1.0
        return self.factor * min(1.0, (step - self.from_step + 1) / (self.rewarm_steps + 1))


class OpenEvent(BaseModel):
    """An event of which it is not known yet what becomes of it."""

    id: str
    step: int
    steps_lost: int
    seconds_lost: float

    def outcome(self, state: State, at_step: int) -> SpikeOutcome:
        """What is known of it after ``at_step`` steps."""
        return SpikeOutcome(state=state, at_step=at_step, steps_lost=self.steps_lost, seconds_lost=self.seconds_lost)


class Journal(BaseModel):
    """Equal on every rank."""

    decisions: dict[int, Action] = Field(default_factory=dict)
    """Steps of the timeline that holds, counted from 1, whose events were answered on the spot. They are not events
    again when a resumed run repeats them."""
    rewinds: list[int] = Field(default_factory=list)
    """The steps that training went back to, in order."""
    skipped_samples: list[SkippedSamples] = Field(default_factory=list)
    lr_cuts: list[LrCut] = Field(default_factory=list)
    anticipated_from: list[int] = Field(default_factory=list)
    """Steps done when anticipatory routing was switched on."""
    events: int = 0
    """Spikes so far."""
    rung: int = 0
    """The rung of the ladder that the next event gets, if it comes soon."""
    last_event_step: int | None = None
    skipped_steps: int = 0
    """Updates refused in all."""
    open: list[OpenEvent] = Field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The journal of a run; an empty one if there is none.

        Raises:
            UserError: the file is damaged, and without it the run would take other steps than it did.
        """
        try:
            return cls.model_validate(read_json(path))
        except (ValueError, ValidationError) as error:
            raise UserError(f"{path} is damaged ({error}); without it the run cannot go on as it was") from error

    def write(self, path: Path) -> None:
        """Write it whole. What a full disk does not take is logged: it is written again with the next event."""
        try:
            write_json(path, self.model_dump(mode="json"))
        except OSError as error:
            _log.warning("%s cannot be written, so a run that is resumed may answer a spike again: %s", path, error)

    def go_back(self, step: int) -> None:
        """Training goes back to the state after ``step``: what was decided after it is over."""
        self.rewinds.append(step)
        self.decisions = {at: action for at, action in self.decisions.items() if at <= step}

    def lr_factor(self, step: int) -> float:
        """Factor on the learning rate of the step that follows ``step`` steps."""
        factor = 1.0
        for cut in self.lr_cuts:
            factor *= cut.at(step)
        return factor
