"""Whether a replay repeats what the run did, bit for bit, and what is known to be different if it does not.

Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.config.anticipation import NoAnticipationConfig
from pipelines.loading import parse_setting
from pipelines.spike_words import counted
from pipelines.spool import REWIND, TRAIN, Record, SpoolReader, live
from tuning.replay_faults import fault_cut_by
from tuning.replay_plan import Plan

_COMPARED = ("train/loss", "train/grad_norm")
# Of what a run was made with, what can change a bit.
_PACKAGES = ("torch", "numpy")


@dataclass(frozen=True)
class Reproduction:
    """How the treatment that changes nothing compares with the run, from the replay's first step to the event's."""

    steps: int
    """How many were compared: those that the run has recorded."""
    differs: str | None
    """Where and how it first differs; None if every bit of loss and gradient norm is the same."""
    reasons: tuple[str, ...] = ()
    """What is known to be otherwise than it was in the run."""

    @property
    def is_exact(self) -> bool:
        """Whether the spike came again as it was."""
        return self.differs is None

    @property
    def sentence(self) -> str:
        """In words."""
        if self.differs is None:
            return f"reproduced: loss and gradient norm of {counted(self.steps, 'step')} are the run's, bit for bit"
        why = "; ".join(self.reasons) if self.reasons else "nothing that is recorded says why"
        return f"not reproduced: {self.differs}. What is known to be different: {why}"


def steps_of_timeline(spool: Path, timeline: int) -> dict[int, Record]:
    """The steps of a run by their numbers, as they stood when it had gone back ``timeline`` times."""
    records, rewinds = [], 0
    for record in SpoolReader(spool).read():
        rewinds += record.kind == REWIND
        if rewinds > timeline:
            break
        records.append(record)
    return {record.step: record for record in live(records) if record.kind == TRAIN}


def compare(plan: Plan, trial: Path, reasons: tuple[str, ...]) -> Reproduction:
    """Compare a trial's spool with the run's.

    Args:
        plan: the replay.
        trial: spool of the treatment that changes nothing.
        reasons: of `what_is_different`.
    """
    was, now = steps_of_timeline(plan.run.spool, plan.event.timeline), steps_of_timeline(trial, 0)
    steps = [step for step in sorted(was) if plan.start.step < step <= plan.event.step]
    if plan.event.step not in was:
        return Reproduction(len(steps), f"the run's record of step {plan.event.step:,} is missing", reasons)
    for number, step in enumerate(steps):
        if step not in now:
            return Reproduction(number, f"the replay ended before step {step:,}", reasons)
        for name in _COMPARED:
            before, after = _value(was[step], name), _value(now[step], name)
            if before != after:
                found = f"at step {step:,} {name} is {after} where the run had {before}"
                return Reproduction(number, found, (*reasons, *_rate_differs(was[step], now[step])))
    return Reproduction(len(steps), None)


def what_is_different(
    plan: Plan, digests: Mapping[str, str | None], then: Mapping[str, Any], now: Mapping[str, Any], gpu: bool
) -> tuple[str, ...]:
    """What can make the replay differ from the run, as far as that is recorded.

    Args:
        plan: the replay.
        digests: ``corpus_digest`` and ``tokenizer_sha256`` of the text that is read now.
        then: the run's environment, as of `pipelines.environment.environment`; empty if it is not recorded.
        now: that of this machine.
        gpu: whether training is on GPUs.
    """
    keys = dict.fromkeys(".".join(parse_setting(setting)[0]) for setting in plan.settings)
    found = [f"--set changes {key}" for key in keys]
    saved = plan.start.manifest.metadata if plan.start.manifest is not None else {}
    names = {"corpus_digest": "the text", "tokenizer_sha256": "the tokenizer"}
    found += [f"{what} has changed" for key, what in names.items() if key in saved and saved[key] != digests[key]]
    threads = plan.arms[0].config.parallel.threads
    if saved.get("threads", threads) != threads:
        found.append(f"the checkpoint was saved with {saved['threads']} threads, and parallel.threads is {threads}")
    found += _environments(then, now)
    if gpu:
        found.append("kernels of GPUs may add in no fixed order")
    went_back = any(step > plan.start.step for step in plan.rewinds[: plan.event.timeline])
    anticipates = not isinstance(plan.config.stability.anticipation, NoAnticipationConfig)
    if went_back and anticipates:
        found.append("the run dropped anticipated choices when it went back on the way to the event")
    if (number := fault_cut_by(plan.config, plan.start.step)) is not None:
        found.append(f"faults.{number} lasted over the step that the replay begins with, and a restart ends it")
    return tuple(found)


def _environments(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    pairs = {package: [e.get("packages", {}).get(package) for e in (then, now)] for package in _PACKAGES}
    pairs["the processor"] = [e.get("cpu") for e in (then, now)]
    pairs["the commit of this project"] = [(e.get("git") or {}).get("commit") for e in (then, now)]
    found = [f"{what} was {a}, and is {b}" for what, (a, b) in pairs.items() if a is not None and a != b]
    if any((e.get("git") or {}).get("dirty") for e in (then, now)):
        found.append("the code had changes that were not committed")
    return found


def _value(record: Record, name: str) -> float | str | None:
    return "not finite" if name in record.non_finite else record.metrics.get(name)


def _rate_differs(was: Record, now: Record) -> list[str]:
    before, after = _value(was, "train/lr"), _value(now, "train/lr")
    if before == after:
        return []
    return [f"the step's learning rate was {before}, and is {after}: a resumed run may have another schedule.steps"]
