"""Which answer a spike gets: the ladder of ``response``, a pure function of config and journal. Imports no torch."""

from dataclasses import dataclass

from pipelines.journal import Journal
from pipelines.response_config import LadderResponseConfig, RecordResponseConfig, ResponseConfig, Rung
from pipelines.spike_event import Action, Kind
from pipelines.spike_words import KINDS

_REWINDS = ("rewind", "rewind_skip_samples", "rewind_anticipate", "rewind_lower_lr")


@dataclass(frozen=True)
class Answer:
    """What to do, and where on the ladder the next event stands if it comes soon."""

    action: Action
    next_rung: int
    reason: str = ""
    """Why a run is aborted, in words that end a sentence."""

    @property
    def goes_back(self) -> bool:
        """Whether training goes back to an earlier state."""
        return self.action.startswith("rewind")


def is_relapse(config: LadderResponseConfig, journal: Journal, step: int) -> bool:
    """Whether an event at ``step`` belongs to the one before it. Steps that are repeated are before it, and belong."""
    return journal.last_event_step is not None and step <= journal.last_event_step + config.calm_steps


def answer(config: ResponseConfig, journal: Journal, kind: Kind, step: int, *, is_taken: bool = False) -> Answer:
    """The answer to an event of this kind at ``step`` (counted from 1).

    ``is_taken``: it was found in the update itself, which can be taken back but not refused any more.
    """
    if isinstance(config, RecordResponseConfig):
        if kind == "non_finite":
            what = "the update" if is_taken else "loss or gradient"
            return Answer("abort", 0, f"{what} was not finite at step {step}")
        return Answer("record", 0)
    rung = journal.rung if is_relapse(config, journal, step) else 0
    limits = set()
    for number in range(rung, len(config.rungs)):
        obstacle = _obstacle(config, journal, kind, config.rungs[number], is_taken)
        if obstacle is None:
            # What has no batch to blame has no samples to leave out.
            blameless = kind == "replica_mismatch" and config.rungs[number] == "rewind_skip_samples"
            return Answer("rewind" if blameless else config.rungs[number], number + 1)
        limits.add(obstacle)
    if config.after_last == "record" and kind in ("loss", "grad_norm", "max_vio"):
        return Answer("record", len(config.rungs))
    limits.discard("")
    why = f"no answer of response.rungs is left for step {step}: {KINDS[kind]}"
    return Answer("abort", rung, why + (f" ({', '.join(sorted(limits))} reached)" if limits else ""))


def _obstacle(config: LadderResponseConfig, journal: Journal, kind: Kind, rung: Rung, is_taken: bool) -> str | None:
    """What keeps a rung from being used: a limit of the config by its key, or nothing that has a name."""
    if rung in _REWINDS:
        return "response.max_rewinds" if len(journal.rewinds) >= config.max_rewinds else None
    if is_taken or kind == "replica_mismatch" or (kind == "non_finite" and rung == "record"):
        return ""
    if rung == "skip_step" and journal.skipped_steps >= config.max_skipped_steps:
        return "response.max_skipped_steps"
    return None
