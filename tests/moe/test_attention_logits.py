"""The largest logits, in parts of any size, against a loop over single products."""

import math
from typing import Any

import pytest
import torch

import moe.attention_logits
from moe.attention_logits import largest_logits, watch_logits
from moe.batch import Batch
from moe.layers.attention import within_documents
from tests.moe.build import build_model, random_ids, small_config

B, H, S, K = 3, 2, 7, 4


def plain(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, real: torch.Tensor | None) -> list[float]:
    largest = [-math.inf] * H
    for head in range(H):
        for b in range(B):
            for i in range(S):
                for j in range(S):
                    sees = j <= i if mask is None else bool(mask[b, 0, i, j])
                    if sees and (real is None or real[b, i]):
                        largest[head] = max(largest[head], float(q[b, head, i] @ k[b, head, j]) / math.sqrt(K))
    return largest


@pytest.mark.parametrize("at_a_time", [1, 30, 100, 1 << 20])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_largest_logits_are_those_of_a_loop(
    at_a_time: int, documents: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe.attention_logits, "_AT_A_TIME", at_a_time)
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(B, H, S, K, generator=generator) for _ in range(2))
    k[:, :, -1] *= 10.0  # the last key, which the last query alone sees
    q[0, :, 3] *= 10.0
    mask = within_documents((torch.arange(S) // 3).expand(B, -1)) if documents else None
    real = None
    if padded:
        real = torch.ones(B, S, dtype=torch.bool)
        real[0, 3:5] = False
        real[1] = False
    found = largest_logits(q, k, mask, real)
    assert found.tolist() == pytest.approx(plain(q, k, mask, real), rel=1e-5)
    assert found.dtype == torch.float32


def test_no_real_query_gives_minus_infinity() -> None:
    x = torch.ones(B, H, S, K)
    assert largest_logits(x, x, None, torch.zeros(B, S, dtype=torch.bool)).tolist() == [-math.inf] * H


@pytest.mark.parametrize("changes", [{}, {"attention": {"kind": "mha", "num_heads": 2, "head_dim": 8}}])
def test_every_block_is_seen_in_order_and_only_when_asked(changes: dict[str, Any]) -> None:
    model = build_model(small_config(mtp={"depth": 1}, **changes))
    seen: list[int] = []
    handles = watch_logits(model.blocks(), lambda number, _: seen.append(number), torch.is_grad_enabled)
    batch = Batch(random_ids(2, 8))
    with torch.no_grad():
        model(batch)
    assert seen == []
    model(batch)
    assert seen == [0, 1, 2, 3]
    for handle in handles:
        handle.remove()
    model(batch)
    assert len(seen) == 4
