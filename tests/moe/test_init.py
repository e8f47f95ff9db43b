import math
from typing import Any

import pytest
import torch

from moe.config.model import InitConfig, ModelConfig
from moe.init import initialise
from moe.model import Transformer
from moe.parallel import Ranks
from tests.moe.build import ALONE, small_config

CONFIG = small_config(attention={"q_lora_rank": 12}, mtp={"depth": 1})


def initialised(
    ranks: Ranks = ALONE, seed: int = 0, std: float = 0.02, config: ModelConfig = CONFIG, **init: Any
) -> Transformer:
    model = Transformer(config, ranks)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    initialise(model, InitConfig(std=std, **init), seed, ranks)
    return model


@pytest.mark.parametrize("ep", [2, 4])
def test_weights_do_not_depend_on_the_degree_of_expert_parallelism(ep: int) -> None:
    whole = initialised().state_dict()
    parts = [initialised(Ranks(torch.device("cpu"), rank, ep, ep)).state_dict() for rank in range(ep)]
    for name, tensor in whole.items():
        if ".experts." in name:
            assert torch.equal(torch.cat([part[name] for part in parts]), tensor), name
        else:
            assert all(torch.equal(part[name], tensor) for part in parts), name


@pytest.mark.parametrize("std", [0.006, 0.1])
def test_matrices_have_the_configured_deviation(std: float) -> None:
    model = initialised(std=std)
    for name, parameter in model.named_parameters():
        values = parameter.detach().double().flatten()
        if parameter.dim() == 1:
            assert (values == 1).all(), name
            continue
        # Five deviations of the sample's own mean and deviation.
        assert abs(float(values.mean())) < 5 * std / math.sqrt(len(values)), name
        assert float(values.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * len(values))), name
        assert values.abs().max() > 2 * std, name
    for layer in model.moe_layers():
        assert layer.router.expert_bias_E.abs().max() == 0


def test_outputs_of_sub_layers_start_smaller_and_embeddings_larger() -> None:
    """Three layers: 1 / sqrt(6); the multi-token block's as well. Every other matrix stays as it was, bit for bit."""
    plain = initialised().state_dict()
    scaled = initialised(output_scale="depth", embedding_std=1.0).state_dict()
    outputs = set()
    for name, tensor in scaled.items():
        if name == "embed.weight":
            torch.testing.assert_close(tensor, plain[name] * 50)
        elif name.endswith(("attention.out_proj.weight", "ffn.down.weight", "shared.down.weight", "experts.w_down")):
            torch.testing.assert_close(tensor, plain[name] / math.sqrt(6))
            outputs.add(name)
        else:
            assert torch.equal(tensor, plain[name]), name
    assert len(outputs) == 3 * 2 + 2 + 3  # three blocks, a shared expert in two of them; all three of the MTP block


def test_no_two_matrices_are_alike_and_no_two_experts() -> None:
    rows = []
    for name, parameter in initialised().named_parameters():
        if parameter.dim() > 1:
            tensors = parameter.detach().unbind() if ".experts." in name else [parameter.detach()]
            rows += [tuple(tensor.flatten()[:8].tolist()) for tensor in tensors]
    assert len(set(rows)) == len(rows)


def test_a_seed_gives_one_model_and_another_seed_another() -> None:
    first, again, other = (initialised(seed=seed).state_dict() for seed in (5, 5, 6))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if tensor.dim() > 1:
            assert not torch.equal(tensor, other[name]), name


def test_weights_do_not_depend_on_torchs_global_generator() -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(initialised().state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_layers_do_not_change_when_others_are_added() -> None:
    deeper = initialised(config=CONFIG.model_copy(update={"num_layers": 4})).state_dict()
    assert all(torch.equal(deeper[name], t) for name, t in initialised().state_dict().items() if "mtp" not in name)
