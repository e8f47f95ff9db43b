"""What a replay will do, found out before anything is started. Imports no torch.

A replay begins with a state of the run from before the spike, and with what applied in the run when the spike came:
samples left out by then, learning rates cut by then, refused updates. What came of the spike itself, and later, is none
of its business.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe.config.anticipation import TriggeredAnticipationConfig
from pipelines.checkpoint_manifest import CheckpointError, Manifest, checkpoint_folders, step_of, verify
from pipelines.checkpoint_standing import kept_for
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.journal import Journal, LrCut, SkippedSamples
from pipelines.loading import SETTINGS, Tree, load_config, parse_setting, settings_tree
from pipelines.run_folder import RunFolder
from pipelines.spike_event import Action, SpikeEvent, read_events
from pipelines.spike_list import find_event
from tuning.replay_faults import faults_left_out, needs_checkpoints
from tuning.treatments import AS_IT_WAS, TREATMENTS, Change, Situation, Treatment, refuse_unknown

_DECIDED = {
    ("seed",): "the batches would be others",
    ("schedule",): "the learning rates would be others",
    ("data", "global_batch_size"): "the batches would be others",
    ("data", "sequence_length"): "the batches would be others",
    ("response",): "a replay records spikes and answers none",
    ("checkpoint",): "a replay saves no checkpoints",
    ("validation", "every_steps"): "the last step of a replay is validated",
    ("validation", "per_token"): "a replay leaves no figures of tokens",
    ("tracking", "every_steps"): "a replay records every step",
    ("tracking", "run_name"): "trials are named by their treatments",
}
"""Keys that no setting may change, and why."""


@dataclass(frozen=True)
class Start:
    """The state that all treatments begin with."""

    step: int
    """Optimizer steps done in it."""
    checkpoint: Path | None
    """Where it is; None is the run's first step."""
    manifest: Manifest | None
    why: str
    """Why it is this one, where it is not the one that the event pinned; otherwise empty."""

    @property
    def says(self) -> str:
        """In words."""
        name = self.checkpoint.name if self.checkpoint is not None else "the run's first step"
        return f"{name} ({self.why})" if self.why else name


@dataclass(frozen=True)
class Arm:
    """A treatment as it is in this replay."""

    treatment: Treatment
    change: Change
    config: RunConfig
    """Of its trial."""

    @property
    def name(self) -> str:
        """The treatment's."""
        return self.treatment.name


@dataclass(frozen=True)
class Plan:
    """One replay."""

    run: RunFolder
    config: RunConfig
    """Of the run."""
    event: SpikeEvent
    journal: Journal
    """As it was when the event came, without rewinds: the replay is a run of its own."""
    rewinds: tuple[int, ...]
    """All rewinds of the run."""
    start: Start
    onset: int
    """The event's, counted from 1."""
    until: int
    """The last step."""
    settings: tuple[str, ...]
    """What the user has set for all treatments, as ``key=value``."""
    arms: tuple[Arm, ...]
    """The first changes nothing."""
    left_out: Mapping[str, str]
    """Treatments that cannot act here, and why."""
    faults_left_out: tuple[int, ...] = ()
    """Places in ``faults`` of those that do not happen again."""


def make_plan(run: RunFolder, wanted: str, names: Sequence[str], after: int, settings: Sequence[str]) -> Plan:
    """Plan the replay of an event.

    Args:
        run: the run that it is of.
        wanted: the event, as `pipelines.spike_list.find_event` takes it.
        names: the treatments; all that can act if there are none.
        after: how many steps beyond the event the replay goes.
        settings: keys of the config to set for all treatments.

    Raises:
        UserError: the run has no such event, a treatment cannot act, or a setting is wrong; one line a problem.
    """
    refuse_unknown(names)
    _refuse_decided(settings)
    event = _training_event(run, wanted)
    config = load_config([str(run.config)])
    journal, onset = Journal.read(run.journal), event.onset or event.step
    events = read_events(run.events)
    before = events[: [each.id for each in events].index(event.id)]
    known = journal_as_of(journal, before, event)
    start = choose_start(run, event, journal.rewinds)
    until = min(event.step + after, config.steps)
    changes = _Configs(run, config, settings, start.step, until)
    plain = changes.config(AS_IT_WAS, {})
    situation = Situation(plain, event.kind, start.step, onset, until)
    arms, left_out = [Arm(TREATMENTS[AS_IT_WAS], Change(), plain)], {}
    for name in names or TREATMENTS:
        if name in (arm.name for arm in arms):
            continue
        found = _arm(TREATMENTS[name], situation, changes)
        if isinstance(found, Arm):
            arms.append(found)
        elif names:
            raise UserError(f"--with {name}: cannot act here, for {found}")
        else:
            left_out[name] = found
    return Plan(
        run=run,
        config=config,
        event=event,
        journal=known,
        rewinds=tuple(journal.rewinds),
        start=start,
        onset=onset,
        until=until,
        settings=tuple(settings),
        arms=tuple(arms),
        left_out=left_out,
        faults_left_out=tuple(faults_left_out(config, before)),
    )


def _refuse_decided(settings: Sequence[str]) -> None:
    for setting in settings:
        path, _ = parse_setting(setting)
        for key, why in _DECIDED.items():
            if path[: len(key)] == key or path == key[: len(path)]:
                raise UserError(f"--set {'.'.join(path)}: cannot be set for a replay, for {why}")


def _training_event(run: RunFolder, wanted: str) -> SpikeEvent:
    _, event = find_event(run, wanted)
    if not event.is_training:
        ids = [other.id for other in read_events(run.events) if other.is_training]
        there = f"events of training are {', '.join(ids[-10:])}" if ids else "the run has no events of training"
        raise UserError(f"event {wanted}: is one of operations ({event.kind}), which no step repeats; {there}")
    return event


def _arm(treatment: Treatment, situation: Situation, changes: "_Configs") -> Arm | str:
    """The treatment in this replay, or why it cannot act."""
    change = treatment.change(situation)
    if isinstance(change, str):
        return change
    try:
        return Arm(treatment, change, changes.config(treatment.name, change.config))
    except UserError as error:
        # The whole config was right without it.
        return str(error).splitlines()[0]


class _Configs:
    """The configs of trials: that of the run, with settings, treatment and what a replay needs on top."""

    def __init__(self, run: RunFolder, config: RunConfig, settings: Sequence[str], start: int, until: int) -> None:
        self._run = run
        self._below: dict[str, Tree] = {"replay": _recording(config, start), SETTINGS: settings_tree(settings)}
        self._above: Tree = {
            "checkpoint": {"at_end": False} | ({} if needs_checkpoints(config) else {"every_steps": 0}),
            "validation": {"every_steps": until, "per_token": False},
            "tracking": {"every_steps": 1, "run_name": None},
        }

    def config(self, treatment: str, tree: Tree) -> RunConfig:
        """UserError if it does not hold."""
        trees = {**self._below, treatment: tree, "the replay": self._above}
        return load_config([str(self._run.config)], trees=trees)


def _recording(config: RunConfig, start: int) -> Tree:
    """Spikes are recorded and answered by nothing."""
    tree: Tree = {"response": {"kind": "record"}}
    anticipation = config.stability.anticipation
    if isinstance(anticipation, TriggeredAnticipationConfig) and not anticipation.at_steps:
        # What the run was triggered by is in its journal; a config must name a trigger all the same. This one is over,
        # or else comes with the schedule's last step.
        tree["stability"] = {"anticipation": {"at_steps": [1 if start > 1 else config.steps - 1]}}
    return tree


def journal_as_of(journal: Journal, before: Sequence[SpikeEvent], event: SpikeEvent) -> Journal:
    """What had been decided when ``event`` came, as the journal of a run that has never gone back.

    Args:
        journal: of the run, as it is now.
        before: the run's events before that one, in the order in which they came.
        event: the event.

    Raises:
        UserError: an event before it is not recorded (a full disk), so that this cannot be known.
    """
    spikes = [each for each in before if each.is_training]
    decisions: dict[int, Action] = {}
    answers: dict[int, Action] = {}
    for each in spikes:
        if each.rewound_to is None:
            decisions[each.step] = each.action
        else:
            decisions = {step: action for step, action in decisions.items() if step <= each.rewound_to}
            answers[each.timeline] = each.action
    if answers.keys() != set(range(event.timeline)):
        raise UserError(
            f"event {event.id}: the run had gone back {event.timeline} times before it, and the events of "
            f"{len(answers)} of these are recorded; what applied then cannot be known"
        )
    times = Counter(answers.values())
    return Journal(
        decisions=decisions,
        # In the order of the answers, one each.
        skipped_samples=journal.skipped_samples[: times["rewind_skip_samples"]],
        lr_cuts=journal.lr_cuts[: times["rewind_lower_lr"]],
        anticipated_from=journal.anticipated_from[: times["rewind_anticipate"]],
        events=len(spikes),
    )


def arm_journal(plan: Plan, change: Change, samples: Sequence[int]) -> Journal:
    """The journal that a trial begins with; ``samples`` are those that a treatment may leave out."""
    journal = plan.journal.model_copy(deep=True)
    if change.lr_factor is not None:
        journal.lr_cuts.append(LrCut(from_step=plan.start.step, factor=change.lr_factor, rewarm_steps=0))
    if change.leaves_samples_out:
        skipped = SkippedSamples(from_step=plan.onset - 1, rewound_to=plan.start.step, samples=list(samples))
        journal.skipped_samples.append(skipped)
    return journal


def choose_start(run: RunFolder, event: SpikeEvent, rewinds: Sequence[int]) -> Start:
    """The checkpoint that the event pinned, if it is whole; else the newest before the onset that leads to the event.

    Its standing does not count: one that is discarded now belonged to the timeline that the event was on.
    """
    before = (event.onset or event.step) - 1
    paths = [path for path in reversed(checkpoint_folders(run.checkpoints)) if step_of(path) <= before]
    pinned = kept_for(run.checkpoints, event.id) or [path for path in paths if path.name == event.checkpoint]
    passed = "the event pinned none" if event.checkpoint is None else "" if pinned else f"{event.checkpoint} is gone"
    for path in [*pinned, *(path for path in paths if path not in pinned)]:
        try:
            manifest = verify(path)
        except CheckpointError as error:
            passed = passed or str(error)
            continue
        if leads_to(event, manifest, rewinds):
            return Start(manifest.step, path, manifest, "" if path in pinned else passed)
        passed = passed or f"{path.name} was saved anew after the run had gone back"
    return Start(0, None, None, passed)


def leads_to(event: SpikeEvent, manifest: Manifest, rewinds: Sequence[int]) -> bool:
    """Whether the event lies on the way from a checkpoint on, of a step before it.

    Steps that were never taken back lead to all events. Others must have been saved before the event, and not have been
    taken back between the two.
    """
    if all(step >= manifest.step for step in rewinds):
        return True
    between = rewinds[manifest.timeline : event.timeline]
    return manifest.timeline <= event.timeline and all(step >= manifest.step for step in between)
