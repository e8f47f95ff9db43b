"""Everything that one optimizer step depends on: the part of a run's config that the Trainer reads."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from moe.config.balance import balance_problem
from moe.config.balance_loss import BatchBalanceLossConfig
from moe.config.base import Config
from moe.config.model import ModelConfig
from moe.config.optimizer import AdamwConfig, OptimizerConfig
from moe.config.schedule import ScheduleConfig
from moe.config.stability import StabilityConfig


class PrecisionConfig(Config):
    """What runs in which dtype. Weights, optimizer state, router and norms are fp32 in every case."""

    compute: Literal["fp32", "bf16"] = "fp32"
    """Dtype of matrix products and of tokens on the wire."""


class ParallelConfig(Config):
    """Ranks and what each of them holds."""

    workers: PositiveInt = 1
    """Ranks in all. Every rank reads its own share of each batch."""
    expert_parallel: PositiveInt = 1
    """Ranks over which each layer's experts are divided; workers / expert_parallel copies of every expert exist."""
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
    schedule: ScheduleConfig = ScheduleConfig()
    stability: StabilityConfig = StabilityConfig()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: BatchConfig = BatchConfig()

    @property
    def sequences_per_worker(self) -> int:
        """Sequences per optimizer step on one worker."""
        return self.data.global_batch_size // self.parallel.workers

    @property
    def micro_batches(self) -> int:
        """Forward-backward passes per optimizer step on one worker."""
        return self.sequences_per_worker // (self.data.micro_batch_size or self.sequences_per_worker)

    @model_validator(mode="after")
    def _experts_can_be_balanced(self) -> "TrainerConfig":
        problem = balance_problem(self.stability.balance, self.model.moe, self.schedule)
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
    def _shares_are_whole(self) -> "TrainerConfig":
        workers, experts = self.parallel.workers, self.model.moe.num_experts
        if self.data.global_batch_size % workers:
            raise ValueError(
                f"data.global_batch_size ({self.data.global_batch_size}) "
                f"is not divisible by parallel.workers ({workers})"
            )
        micro = self.data.micro_batch_size
        if micro is not None and self.sequences_per_worker % micro:
            raise ValueError(
                f"data.micro_batch_size ({micro}) does not divide a worker's share of the batch, "
                f"data.global_batch_size / parallel.workers = {self.sequences_per_worker}"
            )
        if self.parallel.expert_parallel > 1 and experts == 0:
            raise ValueError(
                "parallel.expert_parallel is above 1, but model.moe.num_experts is 0: there is no expert to place"
            )
        if experts % self.parallel.expert_parallel:
            raise ValueError(
                f"model.moe.num_experts ({experts}) is not divisible by parallel.expert_parallel "
                f"({self.parallel.expert_parallel})"
            )
        return self
