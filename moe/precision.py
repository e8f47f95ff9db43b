"""What runs in which dtype.

Weights, their gradients and the optimizer's state are fp32. Matrix products and tokens on the wire run in
``precision.compute``: weights are cast where they are used, so there is one copy of them and one place per layer
that decides. The router, norms' statistics, the softmax of the loss and every sum of a loss are fp32.
"""

import torch

from moe.config.trainer import PrecisionConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compute_dtype(config: PrecisionConfig) -> torch.dtype:
    """The dtype of matrix products and of tokens on the wire."""
    return _DTYPES[config.compute]
