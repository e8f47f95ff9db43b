"""How much of what is rounded to FP8 in a step is lost or at the end of the range."""

from collections.abc import Sequence
from typing import Final, Literal

import torch

from moe.fp8.quantise import Counts

Operand = Literal["activations", "weights", "gradients"]
_OPERANDS: Final[tuple[Operand, ...]] = ("activations", "weights", "gradients")


class Tally:
    """Sums over a step's products on this rank; they stay on the device until the step's one synchronisation.

    Counted are the operands of forward (activations, weights) and of the input's gradient (gradients): their blocks do
    not depend on how tokens are divided, unlike those that run along tokens. Copies of a weight on several ranks count
    as one.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3 * len(_OPERANDS), dtype=torch.float64, device=device)

    def clear(self) -> None:
        """Start counting from zero."""
        self.sums.zero_()

    def add(self, operand: Operand, counts: Counts, copies: int = 1) -> None:
        """Count an operand that ``copies`` ranks have."""
        first = 3 * _OPERANDS.index(operand)
        self.sums[first : first + 3] += torch.stack(counts) / copies

    @staticmethod
    def figures(summed: Sequence[float]) -> dict[str, float]:
        """Shares of all values from ``sums`` over all ranks, by the name of the metric.

        ``underflow_share``: values other than 0 that became 0. ``saturated_share``: values that became the format's
        largest number. Nothing is clipped, and the largest value of each block is one of them: 1/128 is the least that
        tiles with fp32 scales can show (less with power-of-two scales, nearly 0 with one scale a tensor). Much more
        says that blocks are flat at the top, as bounded activations make them.
        """
        metrics = {}
        for number, operand in enumerate(_OPERANDS):
            values, underflown, saturated = summed[3 * number : 3 * number + 3]
            metrics[f"fp8/underflow_share_{operand}"] = underflown / max(1.0, values)
            metrics[f"fp8/saturated_share_{operand}"] = saturated / max(1.0, values)
        return metrics
