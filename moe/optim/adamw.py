"""AdamW (arXiv 1711.05101) whose state is held by parameter name.

The arithmetic is torch's own functional AdamW, fused where the device has it, and a plain loop for what that kernel has
not: moments in bf16 (it wants weights, gradients and moments in one dtype) and a learning rate per tensor. Without
``torch.optim.Optimizer`` the first step does not pay the import of torch's compiler (about a second).
"""

from collections.abc import Mapping, Sequence

import torch
from torch.optim.adamw import adamw

from moe.config.optimizer import AdamwOptions
from moe.optim.optimizer import Optimizer
from moe.parameters import Parameter
from moe.units import Units

MOMENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class AdamW(Optimizer):
    """AdamW over the local tensors of ``parameters``."""

    def __init__(self, parameters: Sequence[Parameter], config: AdamwOptions, units: Units | None = None) -> None:
        """``units`` are those of ``parameters``; only update clipping needs them."""
        if config.update_clip == "rms" and units is None:
            raise ValueError("update_clip=rms needs units, to see whole tensors")
        self.config = config
        self.parameters = parameters
        self.units = units
        self.taken = 0  # corrects the moments for their start at 0
        # One counter per tensor, as the fused kernel wants them; it advances them itself.
        self._counters = {p.name: torch.zeros((), device=p.local.device) for p in parameters}
        dtype = MOMENT_DTYPES[config.moments]
        self.exp_avg = {p.name: torch.zeros_like(p.local, dtype=dtype) for p in parameters}
        self.exp_avg_sq = {p.name: torch.zeros_like(p.local, dtype=dtype) for p in parameters}

    @torch.no_grad()
    def step(self, lr: float) -> dict[str, float]:
        """One update with learning rate ``lr`` from the parameters' gradients; returns figures to report.

        Collective with update clipping.
        """
        figures: dict[str, float] = {}
        if self.config.moments == "fp32" and self.config.update_clip == "none":
            for decays in (True, False):
                self._update_fused([p for p in self.parameters if self._decays(p) == decays], lr, decays)
        else:
            figures = self._update_plainly(lr)
        self.taken += 1
        return figures

    def _decays(self, parameter: Parameter) -> bool:
        if parameter.local.dim() == 1:
            return False
        if parameter.name == "embed.weight":
            return self.config.decay_embeddings
        return self.config.decay_router or parameter.group != "router"

    def _update_fused(self, parameters: Sequence[Parameter], lr: float, decays: bool) -> None:
        c = self.config
        adamw(
            [p.local for p in parameters],
            [p.gradient for p in parameters],
            [self.exp_avg[p.name] for p in parameters],
            [self.exp_avg_sq[p.name] for p in parameters],
            [],
            [self._counters[p.name] for p in parameters],
            fused=True,
            amsgrad=False,
            beta1=c.beta1,
            beta2=c.beta2,
            lr=lr,
            weight_decay=c.weight_decay if decays else 0.0,
            eps=c.eps,
            maximize=False,
        )

    def _update_plainly(self, lr: float) -> dict[str, float]:
        c = self.config
        correction1, correction2 = 1 - c.beta1 ** (self.taken + 1), 1 - c.beta2 ** (self.taken + 1)
        rates: Sequence[float | torch.Tensor] = [lr] * len(self.parameters)
        figures: dict[str, float] = {}
        if self.units is not None and c.update_clip == "rms":
            rms_U = self._update_rms(self.units, correction2)
            figures["update_rms_max"] = float(rms_U.max())
            rates = self.units.shares(lr / rms_U.clamp(min=1), [p.local for p in self.parameters])
        for p, rate in zip(self.parameters, rates, strict=True):
            m, v = self._advanced(p)
            update = (m / correction1).div_((v / correction2).sqrt_().add_(c.eps))
            if self._decays(p):
                update.add_(p.local, alpha=c.weight_decay)
            p.local.sub_(update.mul_(rate))
            self.exp_avg[p.name].copy_(m)
            self.exp_avg_sq[p.name].copy_(v)
        return figures

    def _advanced(self, p: Parameter) -> tuple[torch.Tensor, torch.Tensor]:
        """Both moments after this step's gradient, in fp32 and not yet rounded to what is kept."""
        c, gradient = self.config, p.gradient
        m = self.exp_avg[p.name].float().lerp(gradient, 1 - c.beta1)
        v = (self.exp_avg_sq[p.name].float() * c.beta2).addcmul_(gradient, gradient, value=1 - c.beta2)
        return m, v

    def _update_rms(self, units: Units, correction2: float) -> torch.Tensor:
        """``sqrt(mean(g^2 / max(v, eps^2)))`` of each unit with ``v`` after this step and corrected, fp64 [U].

        StableAdamW (arXiv 2304.13013, algorithm 2) as recalled in secondary sources, unconfirmed: whether weight decay
        is slowed down with the rest (here it is), and the correction of ``v``.
        """
        ratios = (
            p.gradient.square().div_((self._advanced(p)[1] / correction2).clamp_(min=self.config.eps**2))
            for p in self.parameters
        )
        return (units.sums(ratios) / units.sizes_U).sqrt()

    def moments(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """``exp_avg`` of gradients and ``exp_avg_sq`` of their squares."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def restore(self, taken: int) -> None:
        """Continue ``taken`` updates after moments of 0 (the moments are filled in place by whoever restores them)."""
        super().restore(taken)
        for counter in self._counters.values():
            counter.fill_(taken)
