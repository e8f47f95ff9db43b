"""What all rules that move the expert bias share: which biases there are, the schedule, and the recentring.

Shape legend: E routed experts, M MoE layers, C classes of documents.
"""

from collections.abc import Iterator, Sequence

import torch

from moe.config.balance import BiasScheduleConfig
from moe.layers.router import Router
from moe.schedule import Moment
from moe.stability.technique import StepLoad


def biases_and_loads(routers: Sequence[Router], load: StepLoad) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every vector of expert biases (a view) and the load that moves it, [E] each: one per layer and class."""
    counts_MCE = load.counts_ME.unsqueeze(1) if load.counts_MCE is None else load.counts_MCE
    for router, counts_CE in zip(routers, counts_MCE, strict=True):
        yield from zip(router.biases, counts_CE, strict=True)


def update_factor(schedule: BiasScheduleConfig, moment: Moment) -> float:
    """Factor on the update of the bias after the step at ``moment``, a pure function of it.

    The warm-up reaches 1 at its last step, the decay 0 at its last.
    """
    done = moment.step + 1
    left = max(0, moment.steps - schedule.frozen_steps - done)
    if schedule.frozen_steps and done > moment.steps - schedule.frozen_steps:
        return 0.0
    rise = done / schedule.warmup_steps if schedule.warmup_steps else 1.0
    fall = left / schedule.decay_steps if schedule.decay_steps else 1.0
    return min(1.0, rise, fall)


def move_bias(bias_E: torch.Tensor, update_E: torch.Tensor, factor: float) -> None:
    """``bias += factor * update``, then ``bias -= mean(bias)``, in place; a factor of 0 leaves every bit as it is.

    Top-k selection does not see a shift common to all experts, so recentring changes no choice; without it the bias of
    a long run drifts to where fp32 steps of 1e-3 are coarse. (Recentring the updates instead would let their rounding
    add up: a mean of 2.5e-6 after 1000 updates by the sign rule.)
    """
    if factor == 0.0:
        return
    shift_bias(bias_E, update_E, factor)
    bias_E.sub_(bias_E.double().mean())


def shift_bias(bias_E: torch.Tensor, update_E: torch.Tensor, factor: float) -> None:
    """``bias += factor * update``, in place, without recentring; a factor of 0 leaves every bit as it is."""
    if factor != 0.0:
        bias_E.add_(update_E, alpha=factor)


def relative_shortage(count_E: torch.Tensor) -> torch.Tensor:
    """``(mean load - load) / mean load`` of each expert, fp32, from integer counts; 0 where nothing was routed.

    Numerator and denominator are exact integers: 1 for an expert without tokens, -1 at twice the mean.
    """
    total = count_E.sum()
    return ((total - count_E.numel() * count_E).double() / total.clamp(min=1)).to(torch.float32)
