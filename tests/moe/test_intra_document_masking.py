"""Documents that share a sequence do not see each other: each is computed as if it stood alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moe.batch import Batch
from moe.layers.attention import build_attention, within_documents
from moe.model import Transformer
from moe.parallel import join
from moe.trainer import Trainer
from tests.distributed import run_distributed
from tests.moe.build import VOCABULARY, build_model, random_ids, small_config
from tests.moe.tiny import MTP, gradients, relative_difference, tiny_config

MHA = {"kind": "mha", "num_heads": 2, "head_dim": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "mla": {"mtp": {"depth": 1}},
    "mla, compressed queries": {"mtp": {"depth": 1}, "attention": {"q_lora_rank": 12}},
    "mla, wide value": {"mtp": {"depth": 1}, "attention": {"v_head_dim": 20}},
    "mha": {"mtp": {"depth": 1}, "attention": MHA},
}
BY_SHAPE = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())

# Lengths of the documents in each row; the last one of a row is cut off.
ROWS = [[5, 1, 9, 11], [1, 1, 22, 2], [26]]
LENGTH = 24
"""Positions that are predicted; two more tokens are read ahead."""


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    ids = random_ids(len(ROWS), LENGTH + 2)
    return ids, torch.stack([torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in ROWS])


def spans() -> list[tuple[int, int, int]]:
    """(row, first position, end) of each document, within the predicted positions."""
    found = []
    for row, lengths in enumerate(ROWS):
        start = 0
        for length in lengths:
            if start < LENGTH:
                found.append((row, start, min(start + length, LENGTH)))
            start += length
    return found


def alone(model: Transformer, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Both logits of each document from a sequence that holds it alone, without any mask; ids read ahead are kept."""
    outputs = []
    for row, start, end in spans():
        output = model(Batch(ids[row : row + 1, start : end + 2]))
        assert output.mtp_logits is not None
        outputs.append((output.logits[0], output.mtp_logits[0]))
    return outputs


@BY_SHAPE
def test_logits_are_those_of_each_document_alone(changes: dict[str, Any]) -> None:
    model = build_model(small_config(**changes))
    ids, documents = packed()
    with torch.no_grad():
        output = model(Batch(ids, None, documents))
        unmasked = model(Batch(ids))
        for (row, start, end), (logits, ahead) in zip(spans(), alone(model, ids), strict=True):
            torch.testing.assert_close(output.logits[row, start:end], logits, rtol=0, atol=1e-5)
            torch.testing.assert_close(output.mtp_logits[row, start:end], ahead, rtol=0, atol=1e-5)
            if start > 0:
                assert (unmasked.logits[row, start:end] - logits).abs().max() > 1e-2
                assert (unmasked.mtp_logits[row, start:end] - ahead).abs().max() > 1e-2


@BY_SHAPE
def test_gradients_are_the_sum_over_documents_alone(changes: dict[str, Any]) -> None:
    ids, documents = packed()
    targets = [F.pad(ids, (0, 2))[:, shift : shift + LENGTH] for shift in (1, 2)]
    together, apart = build_model(small_config(**changes)), build_model(small_config(**changes))
    output = together(Batch(ids, None, documents))
    losses = [
        F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
        for logits, target in zip((output.logits, output.mtp_logits), targets, strict=True)
    ]
    (losses[0] + 0.3 * losses[1]).backward()
    expected = torch.zeros(())
    for (row, start, end), outputs in zip(spans(), alone(apart, ids), strict=True):
        for weight, logits, target in zip((1.0, 0.3), outputs, targets, strict=True):
            expected = expected + weight * F.cross_entropy(logits, target[row, start:end], reduction="sum")
    expected.backward()
    for (name, found), exact in zip(together.named_parameters(), apart.parameters(), strict=True):
        assert found.grad is not None
        assert exact.grad is not None
        assert relative_difference(found.grad, exact.grad) <= 1e-5, name


def test_no_token_of_another_document_changes_anything() -> None:
    """Multi-token prediction reads the next token, so a document's first reaches the position before, and no more."""
    model = build_model(small_config(**SHAPES["mla"]))
    ids, documents = packed()
    for changed in (2, 5, 6, 14):  # in the first row: inside the first document, the second, the third's border tokens
        other = ids.clone()
        other[0, changed] = (ids[0, changed] + 1) % VOCABULARY
        with torch.no_grad():
            before, after = model(Batch(ids, None, documents)), model(Batch(other, None, documents))
        end = next(end for row, start, end in spans() if row == 0 and start <= changed < end)
        reached = (before.logits[0] - after.logits[0]).abs().amax(-1) > 1e-3
        assert reached.nonzero().flatten().tolist() == list(range(changed, end))
        reached = (before.mtp_logits[0] - after.mtp_logits[0]).abs().amax(-1) > 1e-3
        # The position before always reads the token; those after it in its own document attend to what it made of it.
        assert reached.nonzero().flatten().tolist() == list(range(max(changed - 1, 0), end))


@pytest.mark.parametrize("attention", [{}, MHA], ids=["mla", "mha"])
def test_one_document_is_plain_causal_attention(attention: dict[str, Any]) -> None:
    module = build_attention(small_config(attention=attention))
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():  # a module by itself has whatever was in memory
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    x = torch.randn(2, 9, 32, generator=generator)
    mask = within_documents(torch.full((2, 9), 7))
    torch.testing.assert_close(module(x, mask), module(x), rtol=1e-5, atol=1e-6)


def test_the_mask_is_the_definition() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 3, 3]])
    mask = within_documents(documents)
    assert mask.shape == (2, 1, 6, 6)
    for row, of in enumerate(documents.tolist()):
        for query in range(6):
            for key in range(6):
                assert bool(mask[row, 0, query, key]) == (key <= query and of[key] == of[query])


# ---- the trainer ----------------------------------------------------------------------------------------------------


def masked_share(world: int, rank: int, micro: int) -> list[Batch]:
    """8 sequences of 18 tokens in documents of random length, the second with padding at its end; a rank's share."""
    generator = torch.Generator().manual_seed(4)
    ids = (torch.rand(8, 18, generator=generator) ** 3 * 48).long()
    documents = (torch.rand(8, 18, generator=generator) < 0.2).long().cumsum(1)
    real = torch.ones(8, 18, dtype=torch.bool)
    real[1, 11:] = False
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    parts = zip(*(tensor[rows].split(micro) for tensor in (ids, real, documents)), strict=True)
    return [Batch(i, r, d) for i, r, d in parts]


def trained(rank: int, world: int, parallel: dict[str, Any], micro: int) -> Any:
    """Figures of a first step, its gradients, and the evaluation after it."""
    config = tiny_config(
        MTP,
        {"parallel": {"workers": world, **parallel}, "data": {"micro_batch_size": micro}},
        {"stability": {"clip": {"kind": "none"}}},
    )
    trainer = Trainer(config, join(config.parallel), lambda step: masked_share(world, rank, micro))
    report = trainer.step()
    found = gradients(trainer)
    evaluation = trainer.evaluate(masked_share(world, rank, micro))
    return report.metrics, found, evaluation.loss_sum, evaluation.tokens


@pytest.mark.parametrize("parallel", [{"expert_parallel": 2}, {"expert_parallel": 2, "dense": "shard"}, {}])
def test_two_ranks_train_and_validate_what_one_does(parallel: dict[str, Any]) -> None:
    metrics, expected, loss_sum, tokens = run_distributed(trained, 1, {}, 8)[0]
    for found_metrics, found, found_loss, found_tokens in run_distributed(trained, 2, parallel, 2):
        for name in ("train/loss", "train/mtp_loss", "train/balance_loss", "train/grad_norm"):
            assert found_metrics[name] == pytest.approx(metrics[name], rel=1e-5), name
        assert all(relative_difference(found[name], expected[name]) <= 1e-5 for name in expected)
        assert found_loss == pytest.approx(loss_sum, rel=1e-5)
        assert found_tokens == tokens
