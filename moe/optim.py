"""AdamW (arXiv 1711.05101) whose state is held by parameter name.

The arithmetic is torch's own functional AdamW, fused where the device has it. The state lives in plain dictionaries,
not in ``torch.optim.Optimizer``: it is then saved, resharded and rewound like any other named tensor, and the first
step does not pay the import of torch's compiler (about a second).
"""

from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw

from moe.config.optimizer import AdamwConfig
from moe.parameters import Parameter


class AdamW:
    """AdamW over the local tensors of ``parameters``."""

    def __init__(self, parameters: Sequence[Parameter], config: AdamwConfig) -> None:
        self.config = config
        self.parameters = parameters
        self.taken = 0
        """Updates made so far; corrects the moments' start at zero."""
        # One counter per tensor, as the fused kernel wants them; it advances them itself.
        self._counters = {p.name: torch.zeros((), device=p.local.device) for p in parameters}
        self.exp_avg = {p.name: torch.zeros_like(p.local) for p in parameters}
        self.exp_avg_sq = {p.name: torch.zeros_like(p.local) for p in parameters}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with learning rate ``lr`` from the parameters' gradients. Matrices decay, norm gains do not."""
        for decays in (True, False):
            self._update([p for p in self.parameters if (p.local.dim() > 1) == decays], lr, decays)
        self.taken += 1

    def _update(self, parameters: Sequence[Parameter], lr: float, decays: bool) -> None:
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

    def restore(self, taken: int) -> None:
        """Continue after ``taken`` updates (the moments are filled in place by whoever restores them)."""
        self.taken = taken
        for counter in self._counters.values():
            counter.fill_(taken)
