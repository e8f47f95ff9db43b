"""Faults that a run is given on purpose, to compare or to rehearse what protects against them. ``faults``.

Imports pydantic and nothing heavier.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator, model_validator

from moe.config.base import Config

if TYPE_CHECKING:
    from pipelines.config import RunConfig

Share = Annotated[float, Field(gt=0, le=1)]
Content = Literal["repeated_ngram", "shuffled_tokens"]

OPERATIONS = frozenset({"killed_worker", "stalled_worker", "dead_tracking_server", "full_disk", "corrupt_checkpoint"})
"""Kinds of faults that no figure of training depends on."""

_BITS = {"low_mantissa": 0, "exponent": 30, "sign": 31}


class _BadText(Config):
    """What becomes of a batch's tokens."""

    content: Content = "repeated_ngram"
    """repeated_ngram replaces each sequence by its own first tokens, over and over: such text made the gradient spike
    where OLMo 2 (arXiv 2501.00656) had not filtered it. shuffled_tokens puts a sequence's tokens in a random order."""
    ngram_tokens: PositiveInt = 4
    """Tokens that repeated_ngram repeats."""

    @field_validator("ngram_tokens")
    @classmethod
    def _ngram_is_used(cls, ngram_tokens: int, info: ValidationInfo) -> int:
        # By value, since a written config that is read back has every key.
        default = cls.model_fields["ngram_tokens"].default
        if info.data.get("content") == "shuffled_tokens" and ngram_tokens != default:
            raise ValueError("has no effect, since content is shuffled_tokens; leave it out")
        return ngram_tokens


class CorruptedBatchesConfig(_BadText):
    """Optimizer steps whose whole global batch is spoiled.

    Seed, step and place in the list decide which; a larger share hits the steps of a smaller one and others. Text that
    is held out stays as it is.
    """

    kind: Literal["corrupted_batches"] = "corrupted_batches"
    share: Share
    """Share of the optimizer steps that are hit: each by itself, so it is met on average."""
    from_step: PositiveInt = 1
    """The first optimizer step that may be hit, counted from 1."""


class _AtStep(Config):
    """Base of what happens once in a run: not again when the step is repeated after a rewind. When workers that were
    started again repeat it, what has to do with training is part of what they repeat, and operations are not."""

    step: PositiveInt
    """The optimizer step that is hit, counted from 1."""


class CorruptedBatchConfig(_BadText):
    """The samples of one step are bad text, whenever they are read.

    A property of the text and no event in time: a repeated step that reads them again is spoiled again, one that leaves
    them out is not.
    """

    kind: Literal["corrupted_batch"] = "corrupted_batch"
    step: PositiveInt
    """The optimizer step, counted from 1, whose samples they are while none is left out."""


class _Target(_AtStep):
    """Base of what happens to parameters: all of them, those of a group, or those with a name."""

    parameters: Annotated[str, Field(min_length=1)] | None = None
    """Pattern of the names, as ``layers.1.ffn.experts.w_up`` or ``*.router.weight``; ``*`` stands for any text."""
    group: Literal["dense", "router", "experts"] | None = None
    """All parameters of a group, in place of a pattern."""

    @model_validator(mode="after")
    def _is_named_in_one_way(self) -> "_Target":
        if self.parameters is not None and self.group is not None:
            raise ValueError("parameters and group both say what is hit; leave one of them out")
        return self


class WeightScaledConfig(_Target):
    """Parameters multiplied by a factor before the step, on every rank alike."""

    kind: Literal["weight_scaled"] = "weight_scaled"
    factor: float

    @model_validator(mode="after")
    def _something_is_scaled(self) -> "WeightScaledConfig":
        if self.parameters is None and self.group is None:
            raise ValueError("parameters or group is required here: what is scaled")
        if self.factor == 1:
            raise ValueError("factor is 1, which changes nothing")
        return self


class ActivationOutlierConfig(_AtStep):
    """One expert's up-projection multiplied by a factor before the step, and its activations with it."""

    kind: Literal["activation_outlier"] = "activation_outlier"
    layer: NonNegativeInt | None = None
    """The number of a block with experts; null is the first."""
    expert: NonNegativeInt = 0
    factor: PositiveFloat = 50.0


class BitFlipConfig(_Target):
    """One bit of one number in fp32, on one rank. Seed and place in the list decide which of the parameters named."""

    kind: Literal["bit_flip"] = "bit_flip"
    target: Literal["weight", "gradient"] = "weight"
    """weight: before the step. gradient: of this rank, before it is summed over the ranks."""
    bit: Annotated[int, Field(ge=0, le=31)] = _BITS["exponent"]
    """The bit's number, or one of three names: low_mantissa (0, the lowest), exponent (30, the highest of the exponent:
    a number below 2 is multiplied by 2^128), sign (31)."""
    rank: NonNegativeInt = 0

    @field_validator("bit", mode="before")
    @classmethod
    def _bit_by_name(cls, bit: Any) -> Any:
        if isinstance(bit, str) and bit not in _BITS:
            raise ValueError(f"should be {', '.join(_BITS)} or the number of a bit, got {bit!r}")
        return _BITS[bit] if isinstance(bit, str) else bit


class NanGradientConfig(_Target):
    """One number of one rank's gradient becomes NaN, before gradients are summed over the ranks."""

    kind: Literal["nan_gradient"] = "nan_gradient"
    rank: NonNegativeInt = 0


class LrJumpConfig(_AtStep):
    """The learning rate multiplied by a factor."""

    kind: Literal["lr_jump"] = "lr_jump"
    factor: PositiveFloat
    steps: PositiveInt = 1
    """Optimizer steps that it lasts, if training does not go back before."""

    @field_validator("factor")
    @classmethod
    def _it_jumps(cls, factor: float) -> float:
        if factor == 1:
            raise ValueError("is 1, which changes nothing")
        return factor


class RouterCollapseConfig(_AtStep):
    """A router's weights replaced before the step by ones for which all tokens prefer the same few experts."""

    kind: Literal["router_collapse"] = "router_collapse"
    layer: NonNegativeInt | None = None
    """The number of a block with experts that it chooses; null is the first."""
    experts: PositiveInt | None = None
    """How many are preferred, the first ones; null is as many as a token chooses."""


class KilledWorkerConfig(_AtStep):
    """A worker that the operating system kills before the step (SIGKILL), as one that is out of memory."""

    kind: Literal["killed_worker"] = "killed_worker"
    rank: NonNegativeInt = 0


class StalledWorkerConfig(_AtStep):
    """A worker that does nothing before the step, and says nothing."""

    kind: Literal["stalled_worker"] = "stalled_worker"
    rank: NonNegativeInt = 0
    seconds: PositiveFloat
    """More than ``recovery.stall_timeout_s``: a shorter pause is none that anybody would notice."""


class DeadTrackingServerConfig(_AtStep):
    """From the step on nothing reaches MLflow for a while: the driver's delivery meets a refused connection."""

    kind: Literal["dead_tracking_server"] = "dead_tracking_server"
    seconds: Annotated[float, Field(ge=5)] = 10.0
    """How long; deliveries are 2 s apart."""


class FullDiskConfig(_AtStep):
    """No checkpoint can be written from the step on, as if the disk was full. Metrics and events still can be."""

    kind: Literal["full_disk"] = "full_disk"
    steps: PositiveInt
    """Optimizer steps that it lasts."""


class CorruptCheckpointConfig(_AtStep):
    """Before the step the newest checkpoint is damaged and all workers are killed, so that they meet it when back."""

    kind: Literal["corrupt_checkpoint"] = "corrupt_checkpoint"
    damage: Literal["truncated", "bit_flip"] = "bit_flip"
    """truncated: its largest file ends half-way. bit_flip: one bit in the middle of that is another."""


FaultConfig = Annotated[
    CorruptedBatchesConfig
    | CorruptedBatchConfig
    | WeightScaledConfig
    | ActivationOutlierConfig
    | BitFlipConfig
    | NanGradientConfig
    | LrJumpConfig
    | RouterCollapseConfig
    | KilledWorkerConfig
    | StalledWorkerConfig
    | DeadTrackingServerConfig
    | FullDiskConfig
    | CorruptCheckpointConfig,
    Field(discriminator="kind"),
]


def fault_problem(fault: FaultConfig, config: "RunConfig") -> str | None:
    """Why a fault does nothing in this run: the key, and what is wrong; None if it does, as far as the config knows.

    Whether a pattern matches any parameter is known when there is a model.
    """
    return next(_problems(fault, config), None)


def first_layer(config: "RunConfig", *, chooses: bool = False) -> int | None:
    """The first block with experts, or the first whose router chooses them; None if there is none."""
    model = config.model
    layers = range(model.num_layers + model.mtp.depth)
    fitting = (i for i in layers if model.is_moe_layer(i) and not (chooses and model.is_hash_layer(i)))
    return next(fitting, None)


def _problems(fault: FaultConfig, config: "RunConfig") -> Iterator[str]:
    key, step = ("from_step", fault.from_step) if isinstance(fault, CorruptedBatchesConfig) else ("step", fault.step)
    if step > config.steps:
        yield f"{key} ({step}) is after the last of the schedule's {config.steps} optimizer steps"
    if isinstance(fault, LrJumpConfig | FullDiskConfig) and step + fault.steps - 1 > config.steps:
        yield f"steps ({fault.steps}) from step {step} on reach beyond the schedule's {config.steps} optimizer steps"
    rank, workers = getattr(fault, "rank", 0), config.parallel.workers
    if rank >= workers:
        yield f"rank ({rank}) is none of parallel.workers ({workers}), which are counted from 0"
    if isinstance(fault, _BadText):
        shortest = min(config.batch_of(stage)[1] for stage in config.schedule.as_stages())
        if fault.content == "repeated_ngram" and 2 * fault.ngram_tokens > shortest:
            yield f"ngram_tokens ({fault.ngram_tokens}) does not fit twice into a sequence of {shortest} tokens"
    if isinstance(fault, _Target) and fault.group in ("router", "experts") and not config.model.moe.num_experts:
        yield f"group ({fault.group}) is of nothing, since model.moe.num_experts is 0"
    if isinstance(fault, ActivationOutlierConfig | RouterCollapseConfig):
        yield from _problems_of_layer(fault, config)
    yield from _problems_of_operation(fault, config)


def _problems_of_layer(fault: ActivationOutlierConfig | RouterCollapseConfig, config: "RunConfig") -> Iterator[str]:
    model, moe = config.model, config.model.moe
    chooses = isinstance(fault, RouterCollapseConfig)
    layer = first_layer(config, chooses=chooses) if fault.layer is None else fault.layer
    what = "experts to choose from" if chooses else "experts"
    if layer is None:
        yield f"kind is {fault.kind}, but no layer of model has {what}"
        return
    if layer >= model.num_layers + model.mtp.depth or not model.is_moe_layer(layer):
        yield f"layer ({layer}) has no experts; the first that has is {first_layer(config)}"
    if chooses and model.is_hash_layer(layer):
        yield f"layer ({layer}) is hash-routed (model.moe.hash_layers), so its router's weights choose nothing"
    if isinstance(fault, ActivationOutlierConfig):
        if fault.expert >= moe.num_experts:
            yield f"expert ({fault.expert}) is none of model.moe.num_experts ({moe.num_experts}), counted from 0"
    elif fault.experts is not None and not moe.max_choices <= fault.experts < moe.num_experts:
        yield (
            f"experts ({fault.experts}) should be at least the {moe.max_choices} that a token may choose, and fewer "
            f"than model.moe.num_experts ({moe.num_experts})"
        )


def _problems_of_operation(fault: FaultConfig, config: "RunConfig") -> Iterator[str]:
    every = config.checkpoint.every_steps
    if isinstance(fault, StalledWorkerConfig):
        if config.parallel.workers == 1:
            yield "kind is stalled_worker, but parallel.workers is 1: no other waits for it, so nobody notices"
        if fault.seconds <= config.recovery.stall_timeout_s:
            yield (
                f"seconds ({fault.seconds:g}) is not above recovery.stall_timeout_s "
                f"({config.recovery.stall_timeout_s}), so nobody would notice; make either fit"
            )
    elif isinstance(fault, FullDiskConfig):
        last = fault.step + fault.steps - 1
        if not every or last // every == (fault.step - 1) // every:
            yield f"steps ({fault.steps}) from step {fault.step} to {last} have no checkpoint (checkpoint.every_steps)"
    elif isinstance(fault, CorruptCheckpointConfig) and (not every or fault.step <= every):
        yield f"step ({fault.step}) has no checkpoint before it (checkpoint.every_steps is {every})"
