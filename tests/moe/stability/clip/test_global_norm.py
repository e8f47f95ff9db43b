from dataclasses import replace

import pytest
import torch
from torch import nn

from moe.config.clip import GlobalClipConfig
from moe.config.model import ModelConfig
from moe.config.optimizer import AdamwConfig
from moe.optim import AdamW
from moe.parameters import ParameterSet
from moe.stability.clip.global_norm import GlobalClip
from moe.stability.technique import GradientNorms
from tests.moe.build import ALONE
from tests.moe.stability.moments import START


def model_with_gradients() -> nn.Module:
    generator = torch.Generator().manual_seed(6)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(("max_norm", "staged"), [(0.3, None), (1.0, None), (1e3, None), (1e3, 0.3)])
def test_clipping_is_that_of_torch(max_norm: float, staged: float | None) -> None:
    ours, theirs = model_with_gradients(), model_with_gradients()
    parameters = ParameterSet(ours, ALONE, dense_is_sharded=False)
    norms = parameters.norms()
    clip = GlobalClip(GlobalClipConfig(max_norm=max_norm), ModelConfig(), ALONE)
    moment = replace(START, clip_max_norm=staged)
    figures = clip.on_gradients(
        parameters, GradientNorms(norms.pop("total"), norms), AdamW(parameters.all, AdamwConfig()), moment
    )
    max_norm = staged or max_norm
    before = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert figures["clipped"] == float(float(before) > max_norm)
    assert figures["clip_factor"] == pytest.approx(min(1.0, max_norm / float(before)), rel=1e-5)
