"""Tokens travel to their experts and back: every output, every gradient and every byte, against plain loops."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from moe.config.activation import SwigluConfig
from moe.config.trainer import ParallelConfig
from moe.layers.activation import build_activation
from moe.layers.dispatch import dispatch_combine
from moe.layers.experts import Experts
from moe.parallel import join
from tests.distributed import run_distributed

EXPERTS = 8
WIDTH = 12
EXPERT_WIDTH = 10


@dataclass
class Tokens:
    """One rank's tokens, their experts and gates, and the gradient that comes back for the output."""

    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    gates_TK: torch.Tensor
    dy_TD: torch.Tensor


@dataclass
class Result:
    y_TD: torch.Tensor
    dx_TD: torch.Tensor
    dgates_TK: torch.Tensor
    dw_up: torch.Tensor
    dw_down: torch.Tensor
    payload: int
    metadata: int


def expert_weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    w_up = torch.randn(EXPERTS, 2 * EXPERT_WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    return w_up, torch.randn(EXPERTS, WIDTH, EXPERT_WIDTH, generator=generator) / EXPERT_WIDTH**0.5


def tokens(ids_TK: torch.Tensor, seed: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    rows = ids_TK.shape[0]
    x_TD, dy_TD = (torch.randn(rows, WIDTH, generator=generator) for _ in range(2))
    return Tokens(x_TD, ids_TK, torch.rand(ids_TK.shape, generator=generator), dy_TD)


def skewed(rows: int, k: int, seed: int) -> torch.Tensor:
    """Distinct experts per token, expert e about as popular as 1 / (e + 1)^1.5."""
    popularity_E = 1.0 / torch.arange(1, EXPERTS + 1) ** 1.5
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(popularity_E.expand(max(rows, 1), -1), k, generator=generator)[:rows]


def routings(world: int) -> dict[str, list[torch.Tensor]]:
    """For each case, the expert ids of every rank's tokens."""
    last = EXPERTS - 1
    return {
        "skewed": [skewed(40 + 7 * rank, 3, rank) for rank in range(world)],
        "one expert takes all": [torch.full((20, 1), last) for _ in range(world)],
        "one rank takes all": [torch.tensor([[0, 1]]).repeat(9 + rank, 1) for rank in range(world)],
        "every token everywhere": [torch.arange(EXPERTS).repeat(5, 1) for _ in range(world)],
        "each rank keeps its own": [torch.full((6, 1), rank * (EXPERTS // world)) for rank in range(world)],
        "one rank has no token": [skewed(0 if rank == world - 1 else 11, 2, rank) for rank in range(world)],
        "no rank has a token": [skewed(0, 2, rank) for rank in range(world)],
    }


def run(rank: int, world: int, cases: list[list[Tokens]], dtype: torch.dtype) -> list[Result]:
    ranks = join(ParallelConfig(workers=world, expert_parallel=world, device="cpu"))
    held = EXPERTS // world
    results = []
    for case in cases:
        mine = case[rank]
        experts = Experts(held, WIDTH, EXPERT_WIDTH, build_activation(SwigluConfig()))
        with torch.no_grad():
            for parameter, weight in zip((experts.w_up, experts.w_down), expert_weights(), strict=True):
                parameter.copy_(weight[rank * held : (rank + 1) * held])
        x_TD = mine.x_TD.to(dtype).requires_grad_()
        gates_TK = mine.gates_TK.clone().requires_grad_()
        ranks.wire.clear()
        y_TD = dispatch_combine(x_TD, mine.ids_TK, gates_TK, held, experts, ranks)
        y_TD.backward(mine.dy_TD.to(dtype))
        dx, dgates, dw_up, dw_down = (t.grad for t in (x_TD, gates_TK, experts.w_up, experts.w_down))
        # Also on a rank without rows, whose gradients are zero.
        assert dx is not None
        assert dgates is not None
        assert dw_up is not None
        assert dw_down is not None
        results.append(Result(y_TD.detach(), dx, dgates, dw_up, dw_down, ranks.wire.payload, ranks.wire.metadata))
    return results


def dense_loop(case: list[Tokens]) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Outputs, and gradients of every rank's x, every rank's gates, w_up and w_down; fp64, one token at a time."""
    w_up, w_down = (weight.double().requires_grad_() for weight in expert_weights())
    xs = [t.x_TD.double().requires_grad_() for t in case]
    gates = [t.gates_TK.double().requires_grad_() for t in case]
    outputs = []
    total = w_up.sum() * 0 + w_down.sum() * 0
    for t, x, gate in zip(case, xs, gates, strict=True):
        rows = []
        for row, ids in enumerate(t.ids_TK.tolist()):
            y = torch.zeros(WIDTH, dtype=torch.float64)
            for k, expert in enumerate(ids):
                up = w_up[expert] @ x[row]
                y = y + gate[row, k] * (w_down[expert] @ (F.silu(up[:EXPERT_WIDTH]) * up[EXPERT_WIDTH:]))
            rows.append(y)
        y_TD = torch.stack(rows) if rows else x * 0
        outputs.append(y_TD.detach())
        total = total + (y_TD * t.dy_TD.double()).sum() + gate.sum() * 0
    return outputs, torch.autograd.grad(total, [*xs, *gates, w_up, w_down])


def pairs_between(case: list[Tokens], world: int) -> list[list[int]]:
    """``[i][j]``: tokens of rank i that need an expert of rank j."""
    held = EXPERTS // world
    owners = [[{expert // held for expert in ids} for ids in t.ids_TK.tolist()] for t in case]
    return [[sum(j in needed for needed in owners[i]) for j in range(world)] for i in range(world)]


def cases_of(world: int) -> list[list[Tokens]]:
    return [[tokens(ids, 10 + rank) for rank, ids in enumerate(case)] for case in routings(world).values()]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_a_dense_loop(world: int) -> None:
    cases = cases_of(world)
    by_rank = run_distributed(run, world, cases, torch.float32)
    for index, name in enumerate(routings(world)):
        got: list[Result] = [results[index] for results in by_rank]
        outputs, (*by_token, dw_up, dw_down) = dense_loop(cases[index])
        for rank in range(world):
            close(got[rank].y_TD, outputs[rank], f"{name}: output of rank {rank}")
            close(got[rank].dx_TD, by_token[rank], f"{name}: dx of rank {rank}")
            close(got[rank].dgates_TK, by_token[world + rank], f"{name}: gate gradient of rank {rank}")
        close(torch.cat([result.dw_up for result in got]), dw_up, f"{name}: dw_up")
        close(torch.cat([result.dw_down for result in got]), dw_down, f"{name}: dw_down")
        idle = [e for e in range(EXPERTS) if not any((t.ids_TK == e).any() for t in cases[index])]
        assert not torch.cat([result.dw_up for result in got])[idle].any(), f"{name}: an idle expert has a gradient"


def close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}\n{text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 4])
def test_payload_is_one_vector_per_remote_rank_and_pass(world: int, dtype: torch.dtype) -> None:
    cases = cases_of(world)
    by_rank = run_distributed(run, world, cases, dtype)
    vector = WIDTH * dtype.itemsize
    for index, name in enumerate(routings(world)):
        pairs, k = pairs_between(cases[index], world), cases[index][0].ids_TK.shape[1]
        remote = [(i, j) for i in range(world) for j in range(world) if i != j]
        for rank in range(world):
            sent = sum(pairs[i][j] for i, j in remote if i == rank)
            received = sum(pairs[i][j] for i, j in remote if j == rank)
            # Tokens out and combined vectors back; then gradients of those vectors out and of the tokens back.
            result: Result = by_rank[rank][index]
            assert result.payload == (2 * sent + 2 * received) * vector, f"{name}, rank {rank}"
            # A count per peer, an int16 id and an fp32 gate per choice, and the gates' gradients on the way back.
            assert result.metadata == 8 * (world - 1) + k * (6 * sent + 4 * received), f"{name}, rank {rank}"
        total = sum(results[index].payload for results in by_rank)
        assert total == 4 * sum(pairs[i][j] for i, j in remote) * vector, name
    assert sum(results[0].payload for results in by_rank) > 0


def test_a_token_with_several_experts_on_a_rank_travels_once() -> None:
    """What one copy per (token, expert) pair would pay is told apart from what is paid."""
    ids = routings(2)["every token everywhere"]
    case = [tokens(rank_ids, rank) for rank, rank_ids in enumerate(ids)]
    results = run_distributed(run, 2, [case], torch.float32)
    naive = 4 * sum(rank_ids.numel() // 2 for rank_ids in ids) * WIDTH * 4
    assert sum(result[0].payload for result in results) * (EXPERTS // 2) == naive
