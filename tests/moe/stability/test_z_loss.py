"""z-losses against their formulas in fp64, through the trainer: padding, micro-batches and multi-token prediction."""

import math
from typing import Any

import pytest
import torch

from moe.batch import Batch
from moe.config.model import ModelConfig
from moe.config.z_loss import LmZLossConfig, RouterZLossConfig
from moe.layers.router import Routing
from moe.model import ModelOutput
from moe.stability.technique import BatchCounts
from moe.stability.z_loss import LmZLoss, RouterZLoss
from moe.trainer import Trainer
from tests.moe.build import ALONE
from tests.moe.stability.moments import START
from tests.moe.tiny import (
    MTP,
    assert_bit_identical,
    global_batch,
    gradients,
    relative_difference,
    tiny_config,
    tiny_trainer,
    trained,
)

ROUTER: dict[str, Any] = {"stability": {"router_z_loss": {"coefficient": 0.03}}}
LM: dict[str, Any] = {"stability": {"lm_z_loss": {"coefficient": 0.02}}}


def square(logits: list[float]) -> float:
    """(log sum exp)^2."""
    return math.log(sum(map(math.exp, logits))) ** 2


def trainer_at_padding(*changes: dict[str, Any]) -> tuple[Trainer, Batch, ModelOutput]:
    """A trainer before a step with padding, that step's batch, and what the model makes of it."""
    trainer = tiny_trainer(tiny_config(MTP, *changes), padded_steps=(0,))
    batch = global_batch(trainer.config, 0, padded=True)
    with torch.no_grad():
        # Larger than a fresh router has: logits all near 0 have a log-partition of log E, whatever is done to them.
        for router in trainer.routers:
            router.weight.mul_(5.0)
        output = trainer.model(batch)
    return trainer, batch, output


@pytest.mark.parametrize("micro", [None, 2])
def test_the_router_loss_is_a_mean_over_real_tokens_summed_over_layers(micro: int | None) -> None:
    trainer, _, output = trainer_at_padding(ROUTER, {"data": {"micro_batch_size": micro}})
    assert len(output.routings) == 3
    expected = 0.0
    for routing in output.routings:
        assert routing.real_T is not None
        squares = [square(row) for row in routing.logits_TE[routing.real_T].double().tolist()]
        expected += 0.03 * sum(squares) / len(squares)
    assert trainer.step().metrics["train/router_z_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("micro", [None, 2])
def test_the_lm_loss_is_a_mean_over_predicted_tokens(micro: int | None) -> None:
    trainer, batch, output = trainer_at_padding(LM, {"data": {"micro_batch_size": micro}})
    real_BL = batch.real_BL
    assert real_BL is not None
    length = output.logits.shape[1]
    predicted = real_BL[:, :length] & real_BL[:, 1 : length + 1]
    squares = [square(row) for row in output.logits[predicted].double().tolist()]
    assert 0 < len(squares) < predicted.numel()
    metrics = trainer.step().metrics
    assert metrics["train/lm_z_loss"] == pytest.approx(0.02 * sum(squares) / len(squares), rel=1e-5)


@pytest.mark.parametrize("changes", [ROUTER, LM], ids=["router", "lm"])
def test_the_gradient_is_the_slope_of_the_loss(changes: dict[str, Any]) -> None:
    """Difference of two trainers' gradients, with and without the loss, against central differences of its value."""
    [(name, config)] = changes["stability"].items()
    found = []
    for stability in ({name: config}, {}):
        trainer, _, _ = trainer_at_padding({"stability": {"clip": {"kind": "none"}, **stability}})
        trainer.step()
        found.append(gradients(trainer))
    target = "layers.1.ffn.router.weight" if name == "router_z_loss" else "head.weight"
    difference = found[0][target].double() - found[1][target].double()
    unit = difference / difference.norm()
    values = []
    for shift in (1e-2, -1e-2):
        trainer, _, _ = trainer_at_padding(changes)
        with torch.no_grad():
            trainer.model.get_parameter(target).add_(unit.float(), alpha=shift)
        # The shifted router chooses alike but for a few tokens; the z-loss does not depend on choices.
        metrics = trainer.step().metrics
        values.append(metrics[f"train/{name}"])
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(difference.norm()), rel=3e-2)


def test_a_coefficient_of_zero_is_off_to_the_last_bit() -> None:
    off: dict[str, Any] = {"router_z_loss": {"coefficient": 0.0}, "lm_z_loss": {"coefficient": 0}}
    plain, switched = trained([]), trained([{"stability": off}])
    assert_bit_identical(plain, switched)
    assert not any("z_loss" in name for name in switched[0][0])
    assert trained([ROUTER])[0] != plain[0]


def test_logits_in_bf16_are_squared_in_fp32() -> None:
    logits_BSV = (torch.randn(2, 8, 300, generator=torch.Generator().manual_seed(0)) + 20).bfloat16()
    technique = LmZLoss(LmZLossConfig(coefficient=1.0), ModelConfig(), ALONE)
    batch = Batch(torch.zeros(2, 9, dtype=torch.int64))
    output = ModelOutput(logits_BSV.requires_grad_(), None, [])
    term = technique.loss_terms(batch, output, BatchCounts(16, 1, 2, 16), START)["lm_z_loss"]
    expected = logits_BSV.detach().double().logsumexp(dim=-1).square().mean()
    assert term.dtype == torch.float32
    assert term.item() == pytest.approx(expected.item(), rel=1e-6)


def test_padding_adds_no_gradient() -> None:
    technique = RouterZLoss(RouterZLossConfig(coefficient=1.0), ModelConfig(), ALONE)
    logits_TE = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    real_T = torch.tensor([True, False, True, True, False, True])
    ids = torch.zeros(6, 2, dtype=torch.int64)
    routing = Routing(logits_TE, logits_TE.sigmoid(), ids, ids.float(), torch.zeros(4, dtype=torch.int64), real_T)
    batch = Batch(torch.zeros(1, 7, dtype=torch.int64))
    output = ModelOutput(torch.empty(0), None, [routing])
    technique.loss_terms(batch, output, BatchCounts(1, 1, 1, 4), START)["router_z_loss"].backward()
    assert logits_TE.grad is not None
    assert not logits_TE.grad[~real_T].any()
    z_T = logits_TE.detach().double().logsumexp(dim=1, keepdim=True)
    expected = 2 * z_T * logits_TE.detach().double().softmax(dim=1) / 4
    assert relative_difference(logits_TE.grad[real_T], expected[real_T]) < 1e-5


def test_a_dense_model_has_no_router_to_hold_back() -> None:
    dense: dict[str, Any] = {"model": {"moe": {"num_experts": 0}}}
    with pytest.raises(ValueError, match=r"stability.router_z_loss.coefficient is above 0, but model.moe.num_experts"):
        tiny_config(dense, ROUTER)
    assert "train/lm_z_loss" in tiny_trainer(tiny_config(dense, LM)).step().metrics
