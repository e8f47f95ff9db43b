"""What a run does about spikes. ``response``. Imports pydantic and nothing heavier."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moe.config.anticipation import AnticipationConfig, TriggeredAnticipationConfig
from moe.config.base import Config

Rung = Literal["record", "skip_step", "rewind", "rewind_skip_samples", "rewind_anticipate", "rewind_lower_lr"]

_DEFAULT_RUNGS: tuple[Rung, ...] = (
    "skip_step",
    "rewind_skip_samples",
    "rewind_skip_samples",
    "rewind_lower_lr",
)


class RecordResponseConfig(Config):
    """Spikes are recorded, and training goes on; a loss or gradient that is not finite ends the run."""

    kind: Literal["record"] = "record"


class LadderResponseConfig(Config):
    """One answer after the other while spikes come back, and an end with a report when none is left.

    All in one process: no worker starts again. Nothing that counts here is rewound, so the ladder ends in any case.
    """

    kind: Literal["ladder"] = "ladder"
    rungs: list[Rung] = Field(default=list(_DEFAULT_RUNGS), min_length=1)
    """The answers in order: a spike gets the first, one that comes back within ``calm_steps`` the next. ``record``
    takes the step; ``skip_step`` refuses its update. The others go back to a snapshot that is at least ``guard_steps``
    older than the onset, and then: change nothing, which helps against what the hardware has done and not against text;
    leave out the samples since the onset; anticipate, which needs ``stability.anticipation.kind=triggered``; multiply
    the learning rate by ``lr_factor``, after a rise over ``rewarm_steps``. What no batch can have caused (replicas that
    differ) is answered by the first rung that goes back."""
    after_last: Literal["abort", "record"] = "abort"
    """What a spike gets that comes back after the last rung: the end of the run, or nothing unless it is not finite."""
    calm_steps: PositiveInt = 50
    """Steps without another event after which one has been recovered from, and the ladder begins anew."""
    max_rewinds: PositiveInt = 10
    """How often a run may go back in all."""
    max_skipped_steps: PositiveInt = 50
    """Of how many steps a run may refuse the update in all."""
    snapshot_every_steps: PositiveInt = 5
    """Steps between snapshots of the whole state in the memory of each worker."""
    guard_steps: NonNegativeInt = 5
    """By how many steps at least the snapshot that is used is older than the onset. Together with
    ``snapshot_every_steps`` at most 10: so many steps a rewind loses."""
    snapshots: int = Field(default=3, ge=2)
    """How many are held at a time; when none is old enough the newest good checkpoint on the disk that is old enough is
    taken, or the start of the run."""
    memory_gib: PositiveFloat = 8.0
    """Most memory of a worker's host that they may take."""
    lr_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What ``rewind_lower_lr`` multiplies the learning rate by; several of them multiply."""
    rewarm_steps: NonNegativeInt = 20
    """Steps over which the learning rate rises from 0 to that."""

    @model_validator(mode="after")
    def _a_rewind_is_short(self) -> "LadderResponseConfig":
        if self.snapshot_every_steps + self.guard_steps > 10:
            raise ValueError(
                f"snapshot_every_steps ({self.snapshot_every_steps}) and guard_steps ({self.guard_steps}) are more "
                "than 10 together, and a rewind would lose as many steps; make either smaller"
            )
        reach = (self.snapshots - 1) * self.snapshot_every_steps
        if reach < self.guard_steps:
            raise ValueError(
                f"snapshots ({self.snapshots}), {self.snapshot_every_steps} steps apart, reach back {reach} steps at "
                f"times, which is less than guard_steps ({self.guard_steps}); make snapshots at least "
                f"{-(-self.guard_steps // self.snapshot_every_steps) + 1}"
            )
        return self

    @property
    def window_steps(self) -> int:
        """How far a snapshot in memory can lie back, if an event has kept one from being taken; deeper rewinds go to
        the disk."""
        return (self.snapshots + 1) * self.snapshot_every_steps


ResponseConfig = Annotated[RecordResponseConfig | LadderResponseConfig, Field(discriminator="kind")]


def response_problem(response: ResponseConfig, anticipation: AnticipationConfig) -> str | None:
    """Why the response and what triggers anticipatory routing do not go together, in one line; None if they do."""
    triggered = isinstance(anticipation, TriggeredAnticipationConfig)
    asked = isinstance(response, LadderResponseConfig) and "rewind_anticipate" in response.rungs
    if asked and not triggered:
        return (
            "response.rungs has rewind_anticipate, which needs stability.anticipation.kind=triggered; set that, or "
            "leave the rung out"
        )
    if isinstance(anticipation, TriggeredAnticipationConfig) and not anticipation.at_steps and not asked:
        return (
            "stability.anticipation.kind is triggered, but nothing triggers it: put rewind_anticipate into "
            "response.rungs, or name steps in stability.anticipation.at_steps"
        )
    return None
