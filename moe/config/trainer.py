"""Everything that one optimizer step depends on: the part of a run's config that the Trainer reads."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from moe.config.anticipation import anticipation_problem
from moe.config.balance import NoBalanceConfig, SignBalanceConfig, balance_problem
from moe.config.balance_loss import BatchBalanceLossConfig
from moe.config.base import Config
from moe.config.clip import GroupClipConfig, SpamClipConfig
from moe.config.detector import DetectorConfig, RobustDetectorConfig
from moe.config.fp8 import DeepseekV3Fp8Config, Fp8Config, NoFp8Config
from moe.config.model import ModelConfig
from moe.config.monitors import MonitorsConfig
from moe.config.nodes import nodes_problem
from moe.config.optimizer import AdamwConfig, MuonConfig, OptimizerConfig
from moe.config.qk_clip import MaxLogitQkClipConfig
from moe.config.schedule import ScheduleConfig, SimpleSchedule, Stage, StagedSchedule
from moe.config.stability import StabilityConfig


class PrecisionConfig(Config):
    """What runs in which dtype. Weights, optimizer state, router and norms are fp32 in every case."""

    compute: Literal["fp32", "bf16"] = "fp32"
    """Dtype of matrix products and of tokens on the wire."""
    fp8: Fp8Config = NoFp8Config()
    """Which matrix products are in FP8, and how."""


class ParallelConfig(Config):
    """Ranks and what each of them holds."""

    workers: PositiveInt = 1
    """Ranks in all. Every rank reads its own share of each batch."""
    expert_parallel: PositiveInt = 1
    """Ranks over which each layer's experts are divided; workers / expert_parallel copies of every expert exist."""
    expert_nodes: PositiveInt | None = None
    """Nodes over which each layer's experts are spread, in equal contiguous parts by expert id, for the figure
    ``moe/nodes_per_token``; null counts none. They may be imagined: a run on one rank can be asked how far its tokens
    would travel on eight nodes. With ``model.moe.top_groups`` below ``num_groups`` groups must lie on nodes."""
    dense: Literal["replicate", "shard"] = "replicate"
    """Dense parameters: a copy on every rank, or sharded over all ranks (FSDP2)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA (one GPU per worker) where there is any."""
    threads: PositiveInt = 1
    """CPU threads per worker; part of what makes a run repeatable bit for bit."""

    @model_validator(mode="after")
    def _experts_divide_the_ranks(self) -> "ParallelConfig":
        if self.workers % self.expert_parallel:
            raise ValueError(f"workers ({self.workers}) is not divisible by expert_parallel ({self.expert_parallel})")
        return self


class BatchConfig(Config):
    """The size of a batch."""

    global_batch_size: PositiveInt = 32
    """Sequences per optimizer step, over all workers."""
    micro_batch_size: PositiveInt | None = None
    """Sequences per forward on one worker; null takes the worker's whole share at once."""
    sequence_length: PositiveInt = 256
    """Tokens per sequence."""


class TrainerConfig(Config):
    """One optimizer step, completely."""

    seed: NonNegativeInt = 0
    """Decides the starting weights and the order of the data."""
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = AdamwConfig()
    schedule: ScheduleConfig = SimpleSchedule()
    stability: StabilityConfig = StabilityConfig()
    monitors: MonitorsConfig = MonitorsConfig()
    detector: DetectorConfig = RobustDetectorConfig()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: BatchConfig = BatchConfig()

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return sum(self.steps_of(stage) for stage in self.schedule.as_stages())

    @property
    def tokens(self) -> int:
        """Training tokens in all."""
        stages = self.schedule.as_stages()
        sizes = [(self.steps_of(stage), *self.batch_of(stage)) for stage in stages]
        return sum(steps * sequences * length for steps, sequences, length in sizes)

    def steps_of(self, stage: Stage) -> int:
        """Optimizer steps of a stage."""
        sequences, length = self.batch_of(stage)
        return stage.steps or -(-(stage.tokens or 0) // (sequences * length))

    def batch_of(self, stage: Stage) -> tuple[int, int]:
        """Sequences of a global batch in a stage, and tokens per sequence."""
        data = self.data
        return stage.global_batch_size or data.global_batch_size, stage.sequence_length or data.sequence_length

    @model_validator(mode="after")
    def _experts_can_be_balanced(self) -> "TrainerConfig":
        problem = balance_problem(self.stability.balance, self.model.moe, self.steps)
        if problem is not None:
            raise ValueError(problem)
        if self.model.moe.num_experts == 0 and isinstance(self.stability.balance_loss, BatchBalanceLossConfig):
            raise ValueError(
                "stability.balance_loss.kind is batch, but model.moe.num_experts is 0: there is no load to balance; "
                "set it to none"
            )
        if self.model.moe.num_experts == 0 and self.stability.router_z_loss.coefficient > 0:
            raise ValueError(
                "stability.router_z_loss.coefficient is above 0, but model.moe.num_experts is 0: there is no router; "
                "set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _experts_can_be_anticipated(self) -> "TrainerConfig":
        problem = anticipation_problem(self.stability.anticipation, self.model, self.steps)
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _there_is_a_choice_to_balance(self) -> "TrainerConfig":
        moe, stability = self.model.moe, self.stability
        if moe.bias_domains > 1 and isinstance(stability.balance, NoBalanceConfig):
            raise ValueError(
                f"model.moe.bias_domains ({moe.bias_domains}) has no effect, since stability.balance.kind is none and "
                "no bias moves; set bias_domains to 1, or another kind"
            )
        if not moe.hash_layers or self.model.num_choosing_layers:
            return self
        idle = {
            "model.moe.bias_domains is above 1": moe.bias_domains > 1,
            # The defaults need not be switched off.
            f"stability.balance.kind is {stability.balance.kind}": not isinstance(
                stability.balance, NoBalanceConfig | SignBalanceConfig
            ),
            "stability.balance_loss.kind is batch": isinstance(stability.balance_loss, BatchBalanceLossConfig),
        }
        for what, said in idle.items():
            if said:
                raise ValueError(
                    f"{what}, but model.moe.hash_layers ({moe.hash_layers}) leaves no layer that chooses its experts; "
                    "leave it out"
                )
        return self

    @model_validator(mode="after")
    def _groups_lie_on_nodes(self) -> "TrainerConfig":
        nodes = self.parallel.expert_nodes
        problem = nodes_problem(nodes, self.parallel.expert_parallel, self.model.moe) if nodes is not None else None
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _options_of_experts_have_experts(self) -> "TrainerConfig":
        if self.model.moe.num_experts:
            return self
        clip, unused = self.stability.clip, []
        if isinstance(clip, GroupClipConfig):
            groups = {"router": clip.router_max_norm, "experts": clip.experts_max_norm}
            unused = [f"stability.clip.{group}_max_norm" for group, limit in groups.items() if limit is not None]
        if not self.optimizer.decay_router:
            unused.append("optimizer.decay_router")
        if isinstance(self.precision.fp8, DeepseekV3Fp8Config) and self.precision.fp8.dispatch:
            unused.append("precision.fp8.dispatch")
        if unused:
            raise ValueError(f"{unused[0]} has no effect, since model.moe.num_experts is 0; leave it out")
        return self

    @model_validator(mode="after")
    def _clip_has_its_moments(self) -> "TrainerConfig":
        if isinstance(self.stability.clip, SpamClipConfig) and isinstance(self.optimizer, MuonConfig):
            raise ValueError(
                "stability.clip.kind is spam, which clips against the second moment of every parameter, but "
                "optimizer.kind is muon, which keeps none of matrices; set clip.kind to stable_spam, which needs none"
            )
        return self

    @model_validator(mode="after")
    def _heads_can_be_clipped(self) -> "TrainerConfig":
        if isinstance(self.stability.qk_clip, MaxLogitQkClipConfig) and self.model.attention.qk_norm:
            raise ValueError(
                "stability.qk_clip.kind is max_logit, but model.attention.qk_norm norms queries and keys, so that the "
                "size of their weights changes no logit; set qk_clip.kind=none, or qk_norm=false"
            )
        return self

    @model_validator(mode="after")
    def _shares_are_whole(self) -> "TrainerConfig":
        experts, parallel = self.model.moe.num_experts, self.parallel
        self._refuse_uneven_batch(self.data.global_batch_size, "data.global_batch_size")
        if parallel.expert_parallel > 1 and experts == 0:
            raise ValueError(
                "parallel.expert_parallel is above 1, but model.moe.num_experts is 0: there is no expert to place"
            )
        if experts % parallel.expert_parallel:
            raise ValueError(
                f"model.moe.num_experts ({experts}) is not divisible by parallel.expert_parallel "
                f"({parallel.expert_parallel})"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> "TrainerConfig":
        if not isinstance(self.schedule, StagedSchedule):
            return self
        replaced = {
            "bias_update_rate": ("balance", "bias_update_rate"),
            "balance_coefficient": ("balance_loss", "coefficient"),
            "clip_max_norm": ("clip", "max_norm"),
        }
        for number, stage in enumerate(self.schedule.stages):
            name = f"schedule.stages.{number}"
            if stage.global_batch_size is not None:
                self._refuse_uneven_batch(stage.global_batch_size, f"{name}.global_batch_size")
            self._refuse_uneven_samples(stage, name)
            for key, (family, own) in replaced.items():
                technique = getattr(self.stability, family)
                if getattr(stage, key) is not None and own not in type(technique).model_fields:
                    raise ValueError(
                        f"{name}.{key} has nothing to act on: stability.{family}.kind is {technique.kind}, "
                        f"which has no {own}"
                    )
        return self

    def _refuse_uneven_batch(self, sequences: int, key: str) -> None:
        workers, micro = self.parallel.workers, self.data.micro_batch_size
        if sequences % workers:
            raise ValueError(f"{key} ({sequences}) is not divisible by parallel.workers ({workers})")
        if micro is not None and (sequences // workers) % micro:
            raise ValueError(
                f"data.micro_batch_size ({micro}) does not divide a worker's share of the batch, "
                f"{key} / parallel.workers = {sequences // workers}"
            )

    def _refuse_uneven_samples(self, stage: Stage, name: str) -> None:
        """A sample has data.sequence_length tokens: it must fall into whole sequences, a batch into whole samples."""
        sequences, length = self.batch_of(stage)
        whole = self.data.sequence_length
        if whole % length:
            raise ValueError(f"{name}.sequence_length ({length}) does not divide data.sequence_length ({whole})")
        parts = whole // length
        if sequences % parts:
            raise ValueError(
                f"{name}: a batch of {sequences} sequences of {length} tokens is not whole samples of "
                f"data.sequence_length ({whole}) tokens; make its global_batch_size a multiple of {parts}"
            )
