"""Padding is neither load nor loss: a batch with rows of it trains as the batch without them."""

import pytest
import torch

from moe.batch import Batch
from moe.parallel import join
from moe.report import Report
from moe.trainer import Trainer
from tests.moe.tiny import MTP, gradients, relative_difference, tiny_config, weights

COEFFICIENT = 1e-2


def step_of(batch: Batch, coefficient: float) -> tuple[Report, dict[str, torch.Tensor], Trainer]:
    config = tiny_config(
        MTP,
        {"data": {"global_batch_size": len(batch.ids_BL)}},
        {"stability": {"balance_loss": {"coefficient": coefficient}}},
    )
    trainer = Trainer(config, join(config.parallel), lambda step: [batch])
    return trainer.step(), gradients(trainer), trainer


@pytest.mark.parametrize("with_documents", [False, True])
def test_rows_of_padding_change_nothing(with_documents: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = (torch.rand(8, 18, generator=generator) ** 3 * 48).long()
    real = torch.zeros(8, 18, dtype=torch.bool)
    real[:4] = True
    real[2, 7:] = False
    documents = (ids == 0).long().cumsum(1) if with_documents else None
    few = Batch(ids[:4], real[:4], None if documents is None else documents[:4])
    # The balance loss is a mean over all sequences of the batch, those of padding included: twice as many here.
    plain, expected, trainer = step_of(few, COEFFICIENT)
    padded, found, padded_trainer = step_of(Batch(ids, real, documents), 2 * COEFFICIENT)
    for name in ("train/loss", "train/mtp_loss", "train/balance_loss", "train/grad_norm", "moe/router_entropy"):
        assert padded.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-6), name
    # Exact: loads are counts.
    assert padded.layer_max_vio == plain.layer_max_vio
    assert all(relative_difference(found[name], expected[name]) <= 1e-5 for name in expected)
    bias = [name for name in weights(trainer) if name.endswith("expert_bias_E")]
    assert bias
    assert all(torch.equal(weights(trainer)[name], weights(padded_trainer)[name]) for name in bias)


def test_what_padding_holds_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    ids = (torch.rand(4, 18, generator=generator) ** 3 * 48).long()
    real = torch.arange(18) < torch.tensor([[18], [9], [2], [0]])
    other = torch.where(real, ids, (ids + 7) % 48)
    plain, expected, _ = step_of(Batch(ids, real), COEFFICIENT)
    changed, found, _ = step_of(Batch(other, real), COEFFICIENT)
    for name, value in plain.metrics.items():
        assert changed.metrics[name] == pytest.approx(value, rel=1e-6), name
    assert changed.layer_max_vio == plain.layer_max_vio
    assert all(relative_difference(found[name], expected[name]) <= 1e-6 for name in expected)
