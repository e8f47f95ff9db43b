"""A model small enough for a test of a second, its batches, and full (not divided) views of what the ranks hold."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moe.batch import Batch, BatchSource
from moe.config.trainer import TrainerConfig
from moe.parallel import join
from moe.schedule import Timeline
from moe.trainer import Trainer

VOCABULARY = 48
SEQUENCES = 8
LENGTH = 16

MTP: dict[str, Any] = {"model": {"mtp": {"depth": 1}}}
PADDED = (1,)
"""Steps of `trained` whose batch has padding."""

_BASE: dict[str, Any] = {
    "model": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 3,
        "intermediate_size": 40,
        "attention": {
            "kind": "mla",
            "num_heads": 2,
            # Odd sizes, so that shards over 2 and 4 ranks are uneven and one of 4 ranks holds nothing.
            "q_lora_rank": 5,
            "kv_lora_rank": 10,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        },
        "moe": {"num_experts": 8, "top_k": 2, "expert_size": 24, "num_shared_experts": 1, "first_dense_layers": 1},
        # Ten times the default: with 0.006 this small a model is linear, its routing even and its gradients tiny.
        "init": {"std": 0.06},
    },
    # A large eps keeps AdamW smooth: with 1e-8 the sign of a gradient of 1e-9 decides a whole step of a weight.
    "optimizer": {"kind": "adamw", "lr": 5e-3, "eps": 1e-3},
    "schedule": {"kind": "simple", "steps": 20, "warmup_steps": 2},
    "stability": {
        "balance": {"kind": "sign", "bias_update_rate": 1e-2},
        "balance_loss": {"kind": "sequence", "coefficient": 1e-2},
        "clip": {"kind": "global", "max_norm": 0.5},
    },
    "parallel": {"device": "cpu"},
    "data": {"global_batch_size": SEQUENCES, "sequence_length": LENGTH},
}


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        # Another kind has keys of its own: it replaces what lies below.
        if isinstance(value, Mapping) and isinstance(old, Mapping) and value.get("kind") in (None, old.get("kind")):
            value = _merge(old, value)
        merged[key] = value
    return merged


def tiny_config(*changes: Mapping[str, Any]) -> TrainerConfig:
    """The tiny config with ``changes`` laid over it, later ones on top."""
    tree = _BASE
    for change in changes:
        tree = _merge(tree, change)
    return TrainerConfig.model_validate(tree)


def global_batch(config: TrainerConfig, step: int, *, padded: bool = False) -> Batch:
    """All sequences of one step. Tokens are skewed so that routing is; ``padded`` cuts some short, one to nothing."""
    generator = torch.Generator().manual_seed(1000 + step)
    moment = Timeline(config).at(step)
    length = moment.sequence_length + 1 + config.model.mtp.depth
    sequences = moment.global_batch_size
    vocabulary = config.model.vocab_size
    assert vocabulary is not None
    uniform = torch.rand(sequences, length, generator=generator)
    ids_BL = (uniform**3 * vocabulary).long()
    domains_BL = None
    if (classes := config.model.moe.bias_domains) > 1:
        # Pieces of 5 tokens, and low ids more often in class 0, so that classes need different biases.
        pieces_BL = (torch.arange(length) // 5 + torch.arange(sequences).unsqueeze(1)) % classes
        domains_BL = torch.where(ids_BL < vocabulary // 8, 0, pieces_BL)
    if not padded:
        return Batch(ids_BL, domains_BL=domains_BL)
    real_B = torch.randint(2, length + 1, (sequences,), generator=generator)
    real_B[0] = 0
    return Batch(ids_BL, torch.arange(length) < real_B.unsqueeze(1), domains_BL=domains_BL)


def share_of(batch: Batch, config: TrainerConfig, rank: int) -> list[Batch]:
    """The micro-batches of ``rank``: a contiguous share of the sequences."""
    share = len(batch.ids_BL) // config.parallel.workers
    parts = share // (config.data.micro_batch_size or share)
    rows = slice(rank * share, (rank + 1) * share)
    ids = batch.ids_BL[rows].chunk(parts)
    real = [None] * parts if batch.real_BL is None else batch.real_BL[rows].chunk(parts)
    domains = [None] * parts if batch.domains_BL is None else batch.domains_BL[rows].chunk(parts)
    return [Batch(i, r, None, d) for i, r, d in zip(ids, real, domains, strict=True)]


def batches_of(config: TrainerConfig, rank: int, padded_steps: Sequence[int] = ()) -> BatchSource:
    """The batches of ``rank``, with padding at ``padded_steps``."""
    return lambda step: share_of(global_batch(config, step, padded=step in padded_steps), config, rank)


def tiny_trainer(config: TrainerConfig, padded_steps: Sequence[int] = ()) -> Trainer:
    """A trainer on this process's rank. Collective."""
    ranks = join(config.parallel)
    return Trainer(config, ranks, batches_of(config, ranks.rank, padded_steps))


def whole(name: str, local: torch.Tensor, trainer: Trainer) -> torch.Tensor:
    """All of the parameter-like tensor that this rank holds as ``local``; copies must have equal bits. Collective."""
    if isinstance(local, DTensor):
        gathered: torch.Tensor = local.full_tensor()
        return gathered.detach().clone()
    held: list[Any] = [None] * trainer.ranks.world
    if trainer.ranks.world == 1:
        return local.detach().clone()
    dist.all_gather_object(held, local.detach())
    ep = trainer.config.parallel.expert_parallel if ".experts." in name else 1
    for rank, copy in enumerate(held):
        assert torch.equal(copy, held[rank % ep]), f"{name} differs between ranks {rank % ep} and {rank}"
    return torch.cat(held[:ep])


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every gradient, whole. Collective."""
    found = {}
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = whole(name, parameter.grad, trainer)
    return found


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every parameter and expert bias, whole. Collective."""
    named = [*trainer.model.named_parameters(), *trainer.model.named_buffers()]
    return {name: whole(name, tensor.detach(), trainer) for name, tensor in named}


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """``|a - b| / |b|`` in fp64."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN included."""
    return a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor of the state."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def saved(trainer: Trainer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A copy of what this rank holds of the state."""
    state = trainer.state()
    return {name: local(tensor).detach().clone() for name, tensor in state.tensors.items()}, dict(state.scalars)


def load(trainer: Trainer, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
    """Rewind in place to what ``saved`` gave."""
    live = trainer.state().tensors
    assert live.keys() == tensors.keys()
    with torch.no_grad():
        for name, tensor in live.items():
            local(tensor).copy_(tensors[name])
    trainer.restore(scalars)


def trained(changes: list[dict[str, Any]], alter: Callable[[Trainer], None] | None = None, steps: int = 3) -> Any:
    """(figures of each step, weights after) of a few steps in this process."""
    trainer = tiny_trainer(tiny_config(MTP, *changes), PADDED)
    if alter:
        alter(trainer)
    reports = [trainer.step() for _ in range(steps)]
    return [report.metrics for report in reports], weights(trainer)


def assert_bit_identical(a: Any, b: Any) -> None:
    """Of two pairs of figures and tensors."""
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    assert all(same_bits(a[1][name], b[1][name]) for name in a[1])
