"""Starting weights that do not depend on how the model is divided.

Every tensor, and every single expert, has a generator of its own, seeded by (seed, name): a rank draws exactly the
experts it holds, and any number of workers and any expert-parallel degree start from the same model.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch

from moe.config.model import InitConfig
from moe.layers.selection import starting_bias
from moe.model import Transformer
from moe.parallel import Ranks


@runtime_checkable
class HasInitialValues(Protocol):
    """A module some of whose own parameters do not start random."""

    def initial_values(self) -> Mapping[str, torch.Tensor]:
        """By the parameter's name in the module; broadcast to its shape."""


def _normal_(tensor: torch.Tensor, std: float, seed: int, name: str) -> None:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    # Drawn on the CPU in fp32 whatever the device, so that a GPU run starts from the same weights.
    tensor.copy_(torch.empty(tensor.shape).normal_(0.0, std, generator=generator))


_OUTPUTS = (".out_proj.weight", ".down.weight", ".experts.w_down")
"""Ends of the names of each sub-layer's last matrix."""


def standard_deviation(name: str, config: InitConfig, num_layers: int) -> float:
    """Of the normal distribution that the matrix ``name`` of a model of ``num_layers`` is drawn from."""
    if name == "embed.weight":
        return config.embedding_std or config.std
    if config.output_scale == "depth" and name.endswith(_OUTPUTS):
        return config.std / math.sqrt(2 * num_layers)
    return config.std


@torch.no_grad()
def initialise(model: Transformer, config: InitConfig, seed: int, ranks: Ranks) -> None:
    """Fill ``model`` in place: matrices from N(0, ``standard_deviation``^2), expert biases 0, and what modules say.

    Where biases are thresholds they start as ``starting_bias``.
    """
    given = {
        id(module.get_parameter(name)): value
        for module in model.modules()
        if isinstance(module, HasInitialValues)
        for name, value in module.initial_values().items()
    }
    for name, parameter in model.named_parameters():
        std = standard_deviation(name, config, model.config.num_layers)
        if id(parameter) in given:
            parameter.copy_(given[id(parameter)])
        elif ".experts." in name:
            first = ranks.ep_rank * parameter.shape[0]
            for local, expert in enumerate(parameter):
                _normal_(expert, std, seed, f"{name}.{first + local}")
        else:
            _normal_(parameter, std, seed, name)
    for layer in model.moe_layers():
        layer.router.biases.fill_(starting_bias(model.config))
