"""Starting weights that do not depend on how the model is divided.

Every tensor, and every single expert, has a generator of its own, seeded by (seed, name): a rank draws exactly the
experts it holds, and any number of workers and any expert-parallel degree start from the same model.
"""

import hashlib

import torch

from moe.config.model import InitConfig
from moe.layers.norm import RMSNorm
from moe.model import Transformer
from moe.parallel import Ranks


def _normal_(tensor: torch.Tensor, std: float, seed: int, name: str) -> None:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    # Drawn on the CPU in fp32 whatever the device, so that a GPU run starts from the same weights.
    tensor.copy_(torch.empty(tensor.shape).normal_(0.0, std, generator=generator))


@torch.no_grad()
def initialise(model: Transformer, config: InitConfig, seed: int, ranks: Ranks) -> None:
    """Fill ``model`` in place: matrices from N(0, std^2), norm gains 1, expert biases 0."""
    gains = {id(module.weight) for module in model.modules() if isinstance(module, RMSNorm)}
    for name, parameter in model.named_parameters():
        if id(parameter) in gains:
            parameter.fill_(1.0)
        elif ".experts." in name:
            first = ranks.ep_rank * parameter.shape[0]
            for local, expert in enumerate(parameter):
                _normal_(expert, config.std, seed, f"{name}.{first + local}")
        else:
            _normal_(parameter, config.std, seed, name)
    for layer in model.moe_layers():
        layer.router.expert_bias_E.zero_()
