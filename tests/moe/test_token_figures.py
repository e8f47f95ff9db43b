"""The table of tokens against a recount of the routings and the reported loss."""

from typing import Any

import pytest
import torch

from moe.batch import Batch
from moe.token_figures import TokenFigures, token_figures
from tests.distributed import run_distributed
from tests.moe.test_adaptive_compute import CASES, watched
from tests.moe.tiny import MTP, assert_bit_identical, global_batch, share_of, tiny_config, tiny_trainer, weights

FIXED = "fixed number"
CHANGES = {**CASES, FIXED: []}
by_case = pytest.mark.parametrize("case", CHANGES)


def rows(figures: TokenFigures) -> list[tuple[int, int, float, int]]:
    columns = (figures.ids_T, figures.targets_T, figures.losses_T, figures.real_experts_T)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@by_case
def test_rows_are_predicted_tokens_with_their_experts_over_the_trunk(case: str) -> None:
    trainer = tiny_trainer(tiny_config(MTP, *CHANGES[case]), (0,))
    trainer.step()
    batch = global_batch(trainer.config, 90, padded=True)
    assert batch.real_BL is not None
    seen = watched(trainer)
    figures = token_figures(trainer.model, batch)
    assert figures.losses_T.dtype == torch.float32
    assert figures.real_experts_T.dtype == torch.int64
    assert not figures.losses_T.requires_grad
    trunk = [routing.ids_TK.tolist() for [routing] in seen[:2]]  # the third is that of multi-token prediction
    expected = []
    for sequence, (ids, real) in enumerate(zip(batch.ids_BL.tolist(), batch.real_BL.tolist(), strict=True)):
        for position in range(16):
            if real[position] and real[position + 1]:
                chosen = [layer[16 * sequence + position] for layer in trunk]
                number = sum(0 <= expert < 8 for ids_K in chosen for expert in ids_K)
                expected.append((ids[position], ids[position + 1], number))
    assert [(token, target, number) for token, target, _, number in rows(figures)] == expected
    evaluation = trainer.evaluate([batch])
    assert len(expected) == evaluation.tokens
    assert figures.losses_T.double().sum().item() == pytest.approx(evaluation.loss_sum, rel=1e-5)
    assert (len(set(figures.real_experts_T.tolist())) > 3) == (case != FIXED)


def table(rank: int, world: int, changes: list[dict[str, Any]], parallel: dict[str, Any]) -> Any:
    """The table of a rank's share, and two steps around which it was made."""
    config = tiny_config(MTP, *changes, {"parallel": {"workers": world, **parallel}})
    trainer = tiny_trainer(config)
    [batch] = share_of(global_batch(config, 90, padded=True), config, rank)
    metrics = [trainer.step().metrics]
    found = rows(token_figures(trainer.model, batch))
    metrics.append(trainer.step().metrics)
    return found, metrics, weights(trainer)


def test_ranks_make_the_table_of_one_process_and_leave_training_alone() -> None:
    parallel = {"expert_parallel": 2, "dense": "shard"}
    [(expected, *_)] = run_distributed(table, 1, CASES["identity"], {})
    ranks = run_distributed(table, 2, CASES["identity"], parallel)
    found = [row for rank in ranks for row in rank[0]]
    assert [(row[0], row[1], row[3]) for row in found] == [(row[0], row[1], row[3]) for row in expected]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected], rel=1e-4)
    undisturbed = run_distributed(steps_alone, 2, CASES["identity"], parallel)
    assert_bit_identical(ranks[0][1:], undisturbed[0])


def steps_alone(rank: int, world: int, changes: list[dict[str, Any]], parallel: dict[str, Any]) -> Any:
    trainer = tiny_trainer(tiny_config(MTP, *changes, {"parallel": {"workers": world, **parallel}}))
    return [trainer.step().metrics for _ in range(2)], weights(trainer)


def test_a_batch_of_padding_has_no_row() -> None:
    trainer = tiny_trainer(tiny_config(*CASES["threshold"]))
    batch = Batch(torch.zeros(2, 17, dtype=torch.int64), torch.zeros(2, 17, dtype=torch.bool))
    assert rows(token_figures(trainer.model, batch)) == []
