"""Orthogonalisation by Newton-Schulz iteration.

Shape legend: N matrices, R rows, C columns.
"""

import torch

# DeepSeek-V4's hybrid: eight steps that lift small singular values fast and leave all in about 0.7 to 1.1, then two
# that draw them to 1. Each is x <- a x + b (x x^T) x + c (x x^T)^2 x.
_STEPS = (*[(3.4445, -4.7750, 2.0315)] * 8, *[(2.0, -1.5, 0.5)] * 2)


def orthogonalise(x_NRC: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``U V^T`` of each matrix ``U S V^T``, fp32; products are taken in ``dtype``. A matrix of zeros stays one.

    DeepSeek-V4 report, section on Muon. Singular values down to a thousandth of the largest end within 0.1 % of 1;
    below that they end smaller (at a hundred-thousandth, 0.4), and those of 0 stay 0.
    """
    is_tall = x_NRC.shape[-2] > x_NRC.shape[-1]
    x = x_NRC.float().mT if is_tall else x_NRC.float()  # the smaller of the two products
    # By the largest element first, so that squares of a faded momentum (1e-20) do not vanish in the norm.
    tiny = torch.finfo(torch.float32).tiny
    x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=tiny)
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=tiny)).to(dtype)
    for a, b, c in _STEPS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).float()
