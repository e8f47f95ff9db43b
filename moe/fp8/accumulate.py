"""How a Hopper tensor core adds up products of FP8 numbers, emulated.

What is emulated: products are taken 32 at a time, exactly. They and the sum so far are aligned to the largest exponent
among them, of each only the 14 highest bits from there down are kept (what is below is cut off, towards zero), they are
added, and the sum is cut to 14 bits again.

Sources: some 14 bits, and promotion every 128, are in DeepSeek-V3, arXiv 2412.19437, section 3.3.2. That 32 products at
a time are aligned to their largest exponent and cut is attributed to its section 3.5.2, wording unconfirmed. That the
sum so far is aligned with the products is how earlier tensor cores were found to work (Fasi et al., "Numerical behavior
of NVIDIA tensor cores", 2021, unconfirmed); for Hopper that and the direction in which negative numbers are cut are
unconfirmed. Were the sum added apart, errors without promotion would be several times smaller.

Shape legend: M and N outputs, K summed over.
"""

import torch

_AT_ONCE = 32  # the K of one FP8 instruction
_BITS = 14
_ELEMENTS = 1 << 22  # of one temporary


def limited_product(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """``a b^T`` [M, N] as a tensor core adds it up; operands fp32 of few enough bits for exact products."""
    out_MN = a_MK.new_empty(a_MK.shape[0], b_NK.shape[0])
    rows = max(1, _ELEMENTS // ((_AT_ONCE + 1) * max(1, b_NK.shape[0])))
    for start in range(0, a_MK.shape[0], rows):
        part_MK = a_MK[start : start + rows]
        sum_MN1 = a_MK.new_zeros(part_MK.shape[0], b_NK.shape[0], 1)
        for k in range(0, a_MK.shape[1], _AT_ONCE):
            products = part_MK[:, None, k : k + _AT_ONCE] * b_NK[None, :, k : k + _AT_ONCE]
            sum_MN1 = _add_aligned(torch.cat((sum_MN1, products), dim=-1))
        out_MN[start : start + rows] = sum_MN1.squeeze(-1)
    return out_MN


def promoted_product(
    a_MK: torch.Tensor, a_scale_MK: torch.Tensor, b_NK: torch.Tensor, b_scale_NK: torch.Tensor, every: int
) -> torch.Tensor:
    """``(a a_scale) (b b_scale)^T``, added up by a tensor core over ``every`` products and in fp32 beyond.

    Scales are multiplied in where sums are promoted, so they must be constant along each ``every`` of K.
    """
    out_MN = a_MK.new_zeros(a_MK.shape[0], b_NK.shape[0])
    for k in range(0, a_MK.shape[1], every):
        part_MN = limited_product(a_MK[:, k : k + every], b_NK[:, k : k + every])
        out_MN += part_MN * (a_scale_MK[:, k : k + 1] * b_scale_NK[:, k])
    return out_MN


def _add_aligned(terms: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension, which stays with size 1."""
    _, exponent = torch.frexp(terms.abs().amax(dim=-1, keepdim=True))
    # Integers below 2^14 each, so their sum is exact in fp32.
    total = torch.ldexp(terms, _BITS - exponent).trunc_().sum(dim=-1, keepdim=True)
    _, bits = torch.frexp(total)
    excess = (bits - _BITS).clamp_(min=0)
    total = torch.ldexp(torch.ldexp(total, -excess).trunc_(), excess)
    return torch.ldexp(total, exponent - _BITS)
