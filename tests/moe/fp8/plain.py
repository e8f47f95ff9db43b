"""FP8 rounding block by block and number by number, from the definition of the formats alone."""

import bisect
import math

import torch


def numbers_of(mantissa_bits: int, min_exponent: int, largest: float) -> list[float]:
    """Every number of a format from 0 up: subnormal ones, then each exponent's."""
    steps = 2**mantissa_bits
    found = [step / steps * 2.0**min_exponent for step in range(steps)]
    exponent = min_exponent
    while found[-1] < largest:
        found += [(1 + step / steps) * 2.0**exponent for step in range(steps)]
        exponent += 1
    return [number for number in found if number <= largest]


E4M3 = numbers_of(3, -6, 448.0)
E5M2 = numbers_of(2, -14, 57344.0)


def nearest(value: float, numbers: list[float]) -> float:
    """Ties go to the number whose place in the list, and so its last bit, is even."""
    magnitude = abs(value)
    above = min(bisect.bisect_left(numbers, magnitude), len(numbers) - 1)
    below = max(above - 1, 0)
    up, down = numbers[above] - magnitude, magnitude - numbers[below]
    place = above if up < down or (up == down and above % 2 == 0) else below
    return math.copysign(numbers[place], value)


def block_scale(block: torch.Tensor, numbers: list[float], *, power_of_two: bool = False) -> float:
    """Of fp32 values, not all 0."""
    amax = block.abs().max()
    if power_of_two:
        exponent = -140
        while numbers[-1] * 2.0**exponent < float(amax):
            exponent += 1
        return 2.0**exponent
    return float(amax / torch.tensor(numbers[-1]))


def rounded(
    x_RC: torch.Tensor, rows: int, columns: int, numbers: list[float] = E4M3, *, power_of_two: bool = False
) -> torch.Tensor:
    """Blocks of at most rows x columns from the upper left corner on, scales multiplied in; fp32."""
    out = torch.zeros(x_RC.shape)
    for top in range(0, x_RC.shape[0], rows):
        for left in range(0, x_RC.shape[1], columns):
            block = x_RC[top : top + rows, left : left + columns].float()
            if not bool(block.any()):
                continue
            scale = torch.tensor(block_scale(block, numbers, power_of_two=power_of_two))
            codes = torch.tensor([[nearest(float(v), numbers) for v in row] for row in block / scale])
            out[top : top + rows, left : left + columns] = codes * scale
    return out
