"""A small trainer with faults, and one whose test does the same to it by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe.hooks import StepHook
from moe.parallel import join
from moe.schedule import Moment
from moe.trainer import Trainer
from pipelines.config import RunConfig
from pipelines.faults.hooks import fault_hooks
from pipelines.run_folder import RunFolder
from tests.moe.tiny import MTP, batches_of, tiny_config

Fault = dict[str, Any]
Tensors = dict[str, torch.Tensor]

AT = 3
"""The step of most faults, counted from 1."""


def config_of(*faults: Fault, **changes: Any) -> RunConfig:
    """The tiny config of the ground floor's tests, with faults; two layers with experts, and one of the MTP block."""
    recovery = changes.pop("recovery", {})
    tree = tiny_config(MTP, changes).model_dump()
    return RunConfig.model_validate(
        {**tree, "validation": {"max_tokens": 64}, "recovery": recovery, "faults": list(faults)}
    )


def faulty(folder: Path, *faults: Fault, **changes: Any) -> Trainer:
    """A trainer with the faults' hooks, whose record is in ``folder``. Collective."""
    config = config_of(*faults, **changes)
    ranks = join(config.parallel)
    trainer = Trainer(config, ranks, batches_of(config, ranks.rank))
    trainer.hooks += fault_hooks(config, trainer, RunFolder(folder))
    return trainer


class By(StepHook):
    """Does what a test says before a step, or when gradients are complete."""

    def __init__(
        self, before: Callable[[Moment], object] = lambda _: None, after: Callable[[Moment], object] = lambda _: None
    ) -> None:
        self._before, self._after = before, after

    def before_step(self, moment: Moment) -> None:
        self._before(moment)

    def after_backward(self, moment: Moment) -> None:
        self._after(moment)


def weights_at(trainer: Trainer, steps: int) -> list[Tensors]:
    """What this rank holds of the weights as each step's forward meets them."""
    seen: list[Tensors] = []
    trainer.hooks.append(By(before=lambda _: seen.append({p.name: p.local.clone() for p in trainer.parameters.all})))
    for _ in range(steps):
        trainer.step()
    return seen


def gradients_at(trainer: Trainer, steps: int) -> list[Tensors]:
    """This rank's own gradients of each step."""
    seen: list[Tensors] = []
    trainer.hooks.append(By(after=lambda _: seen.append({p.name: p.gradient.clone() for p in trainer.parameters.all})))
    for _ in range(steps):
        trainer.step()
    return seen


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.int32)


def changed(one: Tensors, other: Tensors) -> dict[str, list[int]]:
    """Positions whose bits differ, by name, of the tensors that differ."""
    found = {name: torch.nonzero(bits(one[name]) != bits(other[name])).flatten().tolist() for name in one}
    return {name: positions for name, positions in found.items() if positions}
