from typing import Any

import pytest
import torch
from torch import nn

from moe.config.optimizer import AdamwConfig
from moe.optim import AdamW
from moe.parallel import Ranks
from moe.parameters import ParameterSet


def small_model() -> nn.Module:
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.LayerNorm(7, bias=False), nn.Linear(7, 3, bias=False))


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_updates_are_those_of_torch(weight_decay: float) -> None:
    ours, theirs = small_model(), small_model()
    config = AdamwConfig(beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=weight_decay)
    parameters = ParameterSet(ours, Ranks(torch.device("cpu")), dense_is_sharded=False)
    optimizer = AdamW(parameters.all, config)
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    gains = [p for p in theirs.parameters() if p.dim() == 1]
    assert matrices
    assert gains
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(
        groups,
        betas=(0.8, 0.9),
        eps=1e-6,
        weight_decay=weight_decay,
        foreach=False,
    )
    for step in range(6):
        lr = 0.05 / (step + 1)
        for group in reference.param_groups:
            group["lr"] = lr
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step(lr)
        reference.step()
        if step == 3:
            optimizer.restore(optimizer.taken)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert optimizer.taken == 6


def test_a_parameter_without_gradient_decays_and_its_moments_advance() -> None:
    model = small_model()
    parameters = ParameterSet(model, Ranks(torch.device("cpu")), dense_is_sharded=False)
    optimizer = AdamW(parameters.all, AdamwConfig(weight_decay=0.5))
    set_gradients(model, 0)
    optimizer.step(0.1)
    name = parameters.all[0].name
    weight, exp_avg = parameters.all[0].local.clone(), optimizer.exp_avg[name].clone()
    parameters.clear_gradients()
    optimizer.step(1e-9)
    assert torch.allclose(optimizer.exp_avg[name], 0.9 * exp_avg)
    parameters.clear_gradients()
    optimizer.exp_avg[name].zero_()
    optimizer.step(0.1)
    torch.testing.assert_close(parameters.all[0].local, weight * (1 - 0.1 * 0.5), rtol=1e-5, atol=1e-7)
