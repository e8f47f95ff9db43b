"""The treatments that a spike is replayed under: what each changes, and when it cannot act. Imports no torch.

A treatment begins with the state that the replay begins with, some steps before the spike, and has one change from
there on. State that a change brings with it (the past of another clip, say) begins empty.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moe.config.anticipation import AlwaysAnticipationConfig, TriggeredAnticipationConfig
from moe.config.clip import ZClipConfig
from moe.config.schedule import StagedSchedule
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.loading import Tree
from pipelines.problems import nearest
from pipelines.spike_event import Kind
from pipelines.spike_words import counted

AS_IT_WAS = "as-it-was"
"""The treatment that changes nothing, which every replay has."""

_TIGHTER = 4.0
_LR_FACTOR = 0.5


@dataclass(frozen=True)
class Situation:
    """The spike, and where its replay begins."""

    config: RunConfig
    """Of the treatment that changes nothing."""
    kind: Kind
    start: int
    """Steps done in the state that all treatments begin with."""
    onset: int
    """The first conspicuous step, counted from 1."""
    until: int
    """The last step of the replay."""

    @property
    def steps_before(self) -> int:
        """Steps of the replay before the onset: so many has a treatment to take effect."""
        return self.onset - 1 - self.start


@dataclass(frozen=True)
class Change:
    """What a treatment changes from the beginning of the replay on."""

    config: Tree = field(default_factory=dict)
    """Keys of the run's config."""
    fresh: tuple[str, ...] = ()
    """Beginnings of the names of state that is not taken from the checkpoint: `pipelines.keeper.StartingPoint`."""
    lr_factor: float | None = None
    """On the learning rate."""
    leaves_samples_out: bool = False
    """The samples of the steps from the onset to the event are not read: others are in their place."""


@dataclass(frozen=True)
class Treatment:
    """One way to meet a spike."""

    name: str
    says: str
    """In words, to stand in a table."""
    change: Callable[[Situation], Change | str]
    """What it changes; or why it cannot act, in words that end a sentence."""


def _as_it_was(situation: Situation) -> Change | str:
    return Change()


def _skip_samples(situation: Situation) -> Change | str:
    if situation.kind == "replica_mismatch":
        return "no batch makes replicas differ"
    return Change(leaves_samples_out=True)


def _tight_clip(situation: Situation) -> Change | str:
    config = situation.config
    limit = getattr(config.stability.clip, "max_norm", None) or 1.0
    tree: Tree = {"stability": {"clip": {"kind": "global", "max_norm": limit / _TIGHTER}}}
    if isinstance(config.schedule, StagedSchedule):
        stages = config.schedule.model_dump(mode="json")["stages"]
        # What a stage says of it counts more than the clip's own limit.
        tighter = [{**s, "clip_max_norm": s["clip_max_norm"] and s["clip_max_norm"] / _TIGHTER} for s in stages]
        tree["schedule"] = {"stages": tighter}
    return Change(tree, fresh=("stability.clip.",))


def _zclip(situation: Situation) -> Change | str:
    clip = situation.config.stability.clip
    if isinstance(clip, ZClipConfig):
        return "stability.clip.kind is zclip already"
    # Its mean and variance must be there before the spike is.
    warmup = min(ZClipConfig().warmup_steps, situation.steps_before)
    if warmup < 2:
        return f"its mean and variance take 2 steps before the spike, and there are {situation.steps_before}"
    own = {"kind": "zclip", "warmup_steps": warmup, "max_norm": getattr(clip, "max_norm", None)}
    return Change({"stability": {"clip": own}}, fresh=("stability.clip.",))


def _swiglu_clamp(situation: Situation) -> Change | str:
    activation = situation.config.model.activation.kind
    if activation != "swiglu":
        return f"model.activation.kind is {activation}, which bounds activations already"
    return Change({"model": {"activation": {"kind": "swiglu_clamp"}}})


def _anticipate(situation: Situation) -> Change | str:
    own = situation.config.stability.anticipation
    if isinstance(own, AlwaysAnticipationConfig):
        return "stability.anticipation.kind is always already"
    if situation.steps_before < 1:
        return "its first step routes as ever, and the spike begins with the first step after the checkpoint"
    wanted = own.lag if isinstance(own, TriggeredAnticipationConfig) else AlwaysAnticipationConfig().lag
    # From the first step to the last, at its full lag before the spike.
    anticipation = {"kind": "always", "lag": min(wanted, situation.steps_before)}
    return Change({"stability": {"anticipation": anticipation}}, fresh=("stability.anticipation.",))


def _half_lr(situation: Situation) -> Change | str:
    return Change(lr_factor=_LR_FACTOR)


def _fresh_moments(situation: Situation) -> Change | str:
    if situation.start == 0:
        return "the replay begins with the run's first step, where the moments are 0 in any case"
    return Change(fresh=("optimizer.",))


def _fp32(situation: Situation) -> Change | str:
    precision = situation.config.precision
    if precision.compute == "fp32" and precision.fp8.kind == "none":
        return "precision.compute is fp32 and precision.fp8.kind is none already"
    return Change({"precision": {"compute": "fp32", "fp8": {"kind": "none"}}})


TREATMENTS = {
    treatment.name: treatment
    for treatment in (
        Treatment(AS_IT_WAS, "nothing changed; the spike is recorded, and its step taken", _as_it_was),
        Treatment("skip-samples", "the samples of the spike's steps are left out", _skip_samples),
        Treatment("tight-clip", "the global norm is clipped at a quarter of the limit", _tight_clip),
        Treatment("zclip", "the norm is clipped where it is an outlier (ZClip), on top of the limit", _zclip),
        Treatment("swiglu-clamp", "the inputs of SwiGLU are clamped", _swiglu_clamp),
        Treatment("anticipate", "experts are chosen by the weights of some steps ago", _anticipate),
        Treatment("half-lr", "half the learning rate", _half_lr),
        Treatment("fresh-moments", "the optimizer's moments begin at 0", _fresh_moments),
        Treatment("fp32", "matrix products in fp32", _fp32),
    )
}


def refuse_unknown(names: Sequence[str]) -> None:
    """UserError for the first name that is no treatment's."""
    for name in names:
        if name not in TREATMENTS:
            near = nearest(name, list(TREATMENTS))
            hint = f"did you mean {near}? " if near else ""
            raise UserError(f"--with {name}: no such treatment; {hint}there are {', '.join(TREATMENTS)}")


def what_changes(change: Change, start: int, samples: int) -> str:
    """A change in one line, keys and all; ``start`` is the step that the replay begins after, ``samples`` how many are
    left out, if any are."""
    parts = [
        f"{key}={'null' if value is None else value}" for key, value in _flat(change.config) if key != "schedule.stages"
    ]
    if change.lr_factor is not None:
        parts.append(f"times {change.lr_factor:g} from step {start + 1:,} on")
    if change.leaves_samples_out:
        parts.append(counted(samples, "sample"))
    return ", ".join(parts)


def _flat(tree: Tree, path: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in tree.items():
        found += _flat(value, f"{path}{key}.") if isinstance(value, dict) else [(f"{path}{key}", value)]
    return found
