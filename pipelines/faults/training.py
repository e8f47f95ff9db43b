"""Faults of training itself: weights, gradients, learning rate and routers.

Shape legend: T tokens, D model width, E experts, F expert width.
"""

import math
import random
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from moe.layers.moe import MoeLayer
from moe.parameters import Parameter
from moe.schedule import Moment
from pipelines.checkpoints import held_by_rank
from pipelines.errors import UserError
from pipelines.fault_config import (
    ActivationOutlierConfig,
    BitFlipConfig,
    LrJumpConfig,
    NanGradientConfig,
    RouterCollapseConfig,
    WeightScaledConfig,
)
from pipelines.faults.once import FaultHook, Scene

# Logits of about this size on either side: a sigmoid of 0.9997 against 0.0003, which no expert bias outweighs.
_LOGIT = 8.0
# Of the mean square of an input: enough to solve for a direction where inputs do not span the space.
_RIDGE = 1e-4


def _matching(fault: WeightScaledConfig | BitFlipConfig | NanGradientConfig, scene: Scene) -> list[Parameter]:
    """The parameters that a fault means. UserError if there are none; the same on every rank."""
    parameters = scene.trainer.parameters.all
    pattern = fault.parameters
    if pattern is None:
        return [p for p in parameters if fault.group in (None, p.group)]
    found = [p for p in parameters if fnmatchcase(p.name, pattern)]
    if not found:
        some = ", ".join(p.name for p in parameters[:: max(1, len(parameters) // 3)][:3])
        raise UserError(
            f"faults.{scene.number}.parameters ({pattern}) is the name of no parameter; some names are {some}"
        )
    return found


class WeightScaled(FaultHook):
    """Multiplies parameters."""

    def __init__(self, fault: WeightScaledConfig, scene: Scene) -> None:
        super().__init__(scene)
        self._fault = fault
        self._parameters = _matching(fault, scene)

    def before_step(self, moment: Moment) -> None:
        """At the step."""
        if self.scene.begins(self._fault.kind, self._fault.step, moment):
            for parameter in self._parameters:
                parameter.local.mul_(self._fault.factor)


class ActivationOutlier(FaultHook):
    """Multiplies one expert's up-projection, wherever it is held."""

    def __init__(self, fault: ActivationOutlierConfig, scene: Scene) -> None:
        super().__init__(scene)
        self._fault = fault

    def before_step(self, moment: Moment) -> None:
        """At the step."""
        if not self.scene.begins(self._fault.kind, self._fault.step, moment):
            return
        experts = _moe_layer(self.scene, self._fault.layer).experts
        here = self._fault.expert - self.scene.ranks.ep_rank * experts.num_experts
        if 0 <= here < experts.num_experts:
            w_2FD = experts.w_up.detach()[here]
            w_2FD[len(w_2FD) // 2 :].mul_(self._fault.factor)  # the gate lies above


class _OneNumber(FaultHook):
    """Base of what hits one number of one rank's tensors, drawn among all of those meant."""

    def __init__(self, fault: BitFlipConfig | NanGradientConfig, scene: Scene) -> None:
        super().__init__(scene)
        self._parameters = _matching(fault, scene)
        self._is_here = scene.ranks.rank == fault.rank
        held = self._is_here and any(p.local.numel() for p in self._parameters)
        # Of a small tensor that is sharded a rank may hold nothing; the other ranks must hear of it.
        if not float(scene.ranks.max_over_world(torch.tensor(float(held), device=scene.ranks.device))):
            raise UserError(f"faults.{scene.number}.rank ({fault.rank}) holds no part of the parameters meant")

    def _draw(self, kind: str, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, tuple[int, ...]]:
        """One of the tensors and an index into it, every number of all tensors being as likely."""
        sizes = [tensor.numel() for tensor in tensors]
        at = random.Random(f"{kind} {self.scene.seed} {self.scene.number}").randrange(sum(sizes))
        for tensor, size in zip(tensors, sizes, strict=True):
            if at < size:
                return tensor, tuple(int(i) for i in torch.unravel_index(torch.tensor(at), tensor.shape))
            at -= size
        raise AssertionError("the position is below the sum")


class BitFlip(_OneNumber):
    """Flips a bit of a weight before the step, or of a gradient before it is summed over the ranks."""

    def __init__(self, fault: BitFlipConfig, scene: Scene) -> None:
        super().__init__(fault, scene)
        self._fault = fault

    def before_step(self, moment: Moment) -> None:
        """At the step, if a weight is meant."""
        if self._fault.target == "weight" and self.scene.begins(self._fault.kind, self._fault.step, moment):
            self._flip([p.local for p in self._parameters] if self._is_here else [])

    def after_backward(self, moment: Moment) -> None:
        """At the step, if a gradient is meant."""
        if self._fault.target == "gradient" and self.scene.begins(self._fault.kind, self._fault.step, moment):
            self._flip([p.gradient for p in self._parameters] if self._is_here else [])

    def _flip(self, tensors: Sequence[torch.Tensor]) -> None:
        if tensors:
            tensor, index = self._draw(self._fault.kind, tensors)
            tensor[index] = _flipped(tensor[index], self._fault.bit)


def _flipped(number: torch.Tensor, bit: int) -> torch.Tensor:
    """An fp32 scalar with one bit changed, from 0, the lowest of the mantissa, to 31, the sign."""
    assert number.dtype == torch.float32
    bits = number.reshape(1).clone().view(torch.int32)
    bits ^= -(2**31) if bit == 31 else 1 << bit
    return bits.view(torch.float32)[0]


class NanGradient(_OneNumber):
    """Makes one number of a gradient NaN."""

    def __init__(self, fault: NanGradientConfig, scene: Scene) -> None:
        super().__init__(fault, scene)
        self._fault = fault

    def after_backward(self, moment: Moment) -> None:
        """At the step."""
        if self.scene.begins(self._fault.kind, self._fault.step, moment) and self._is_here:
            tensor, index = self._draw(self._fault.kind, [p.gradient for p in self._parameters])
            tensor[index] = math.nan


class LrJump(FaultHook):
    """Multiplies the learning rate, for as many steps in a row as the config says."""

    def __init__(self, fault: LrJumpConfig, scene: Scene) -> None:
        super().__init__(scene)
        self._fault = fault
        self._latest: int | None = None

    def before_step(self, moment: Moment) -> None:
        """Find out whether it begins or goes on; a rewind or a restart ends it."""
        end = self._fault.step - 1 + self._fault.steps
        goes_on = self._latest == moment.step - 1 and moment.step < end
        begins = self.scene.begins(self._fault.kind, self._fault.step, moment)
        self._latest = moment.step if begins or goes_on else None

    def lr_factor(self, moment: Moment) -> float:
        """The factor of the jump."""
        return self._fault.factor if self._latest == moment.step else 1.0


class RouterCollapse(FaultHook):
    """Gives a router weights for which all tokens of the step prefer the same experts.

    Every expert's vector becomes one and the same direction, forwards for those that are preferred and backwards for
    the others. It is the one along which the inputs of the router agree best: the least squares solution v of x v = 1
    over the tokens of the batch.
    """

    def __init__(self, fault: RouterCollapseConfig, scene: Scene) -> None:
        super().__init__(scene)
        self._fault = fault
        self._router = _moe_layer(scene, fault.layer, chooses=True).router

    @torch.no_grad()
    def before_step(self, moment: Moment) -> None:
        """At the step."""
        if not self.scene.begins(self._fault.kind, self._fault.step, moment):
            return
        direction_D = self._agreed_direction(moment.step)
        preferred = self._fault.experts or self._router.config.max_choices
        weight = held_by_rank(self._router.weight)
        expert_E = torch.arange(*weight.rows, device=direction_D.device)
        sign_E = torch.where(expert_E < preferred, 1.0, -1.0)
        weight.tensor.copy_(_LOGIT * sign_E.unsqueeze(1) * direction_D)

    def _agreed_direction(self, step: int) -> torch.Tensor:
        """[D], such that the product of it with the router's inputs is 1, or near it. Collective."""
        inputs: list[torch.Tensor] = []
        watch = self._router.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))
        try:
            self.scene.trainer.choose(step)
        finally:
            watch.remove()
        x_TD = torch.cat(inputs)
        sums = self.scene.ranks.sum_over_world(torch.cat((x_TD.t() @ x_TD, x_TD.sum(dim=0, keepdim=True))))
        gram_DD, sum_D = sums[:-1], sums[-1]
        ridge_D = (_RIDGE * gram_DD.diagonal().mean()).expand(len(sum_D))
        direction_D: torch.Tensor = torch.linalg.solve(gram_DD + torch.diag(ridge_D), sum_D)
        return direction_D.float()


def _moe_layer(scene: Scene, layer: int | None, *, chooses: bool = False) -> MoeLayer:
    """The layer with experts in the block of this number, or the first, of those with a choice if ``chooses``."""
    layers = [block.ffn for block in scene.trainer.model.blocks()]
    fitting = [m for m in layers if isinstance(m, MoeLayer) and not (chooses and m.hash_choice is not None)]
    found = fitting[0] if layer is None else layers[layer]
    assert isinstance(found, MoeLayer)
    return found
