"""QK-Clip: the logits of a head that were too large come to the threshold, and nothing else changes by a bit."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from moe.layers.attention import Attention
from moe.monitors import measure
from moe.stability.qk_clip import QkClip
from moe.trainer import Trainer
from tests.distributed import run_distributed
from tests.moe.divisions import (
    DIVISIONS,
    Cases,
    Run,
    assert_same_training,
    by_corner,
    reference,
    refused,
    resumed,
    runs_of,
)
from tests.moe.tiny import MTP, PADDED, assert_bit_identical, same_bits, tiny_config, tiny_trainer, trained, weights

MHA = {"kind": "mha", "num_heads": 3, "head_dim": 8}
MLA = {"q_lora_rank": None, "num_heads": 3}
MODELS: dict[str, dict[str, Any]] = {
    "latent attention": {"model": {"attention": MLA}},
    "compressed queries, scaled latents": {"model": {"attention": {"num_heads": 3, "scale_latents": True}}},
    "plain attention": {"model": {"attention": MHA}},
    "dense": {
        "model": {"moe": {"num_experts": 0, "num_shared_experts": 0}},
        "stability": {"balance": {"kind": "none"}},
    },
    "muon": {"optimizer": {"kind": "muon"}, "model": {"attention": MHA}},
}
# Too small to change a weight: what changes is the clip's.
STILL: dict[str, Any] = {"optimizer": {"lr": 1e-30}, "model": {"init": {"std": 0.5}}}


def clip(threshold: float) -> dict[str, Any]:
    return {"stability": {"qk_clip": {"kind": "max_logit", "threshold": threshold}}}


def technique_of(trainer: Trainer) -> QkClip:
    technique = trainer.techniques["qk_clip"]
    assert isinstance(technique, QkClip)
    return technique


class Seen:
    """What each attention read in the training forwards, and which of its queries were real."""

    def __init__(self, trainer: Trainer) -> None:
        self.blocks = trainer.model.blocks()
        self.inputs: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self.blocks]
        for layer, block in enumerate(self.blocks):
            block.register_forward_pre_hook(functools.partial(self._remember, layer))

    def _remember(self, layer: int, block: Any, args: Any) -> None:
        if torch.is_grad_enabled():
            x, positions = args[0].detach(), args[1]
            real = torch.ones(x.shape[:2], dtype=torch.bool) if positions.real_BS is None else positions.real_BS
            self.inputs[layer].append((block.attention_norm(x).detach(), real))

    @torch.no_grad()
    def largest(self, *, with_padding: bool = False) -> list[list[float]]:
        """The largest logit of each head of each block with the weights as they are."""
        found = []
        for block, inputs in zip(self.blocks, self.inputs, strict=True):
            by_head = [-math.inf] * block.attention.config.num_heads
            for x, real in inputs:
                q, k, _ = block.attention.project(x)
                for head in range(len(by_head)):
                    logits = q[:, head] @ k[:, head].mT / math.sqrt(q.shape[-1])
                    logits[:, ~torch.ones(x.shape[1], x.shape[1]).tril().bool()] = -math.inf
                    counted = logits.flatten(0, 1) if with_padding else logits[real]
                    by_head[head] = max(by_head[head], float(counted.max()))
            found.append(by_head)
        return found


def head_rows(attention: Attention, prefix: str, head: int, g: float) -> Iterator[tuple[str, slice, float]]:
    """The rows of a head in each weight and what multiplies them, from the formula."""
    c: Any = attention.config
    if c.kind == "mha":
        rows = slice(head * c.head_dim, (head + 1) * c.head_dim)
        yield f"{prefix}.q_proj.weight", rows, math.sqrt(g)
        yield f"{prefix}.k_proj.weight", rows, math.sqrt(g)
        return
    nope, rope, v = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    queries = f"{prefix}.q_proj.{'' if c.q_lora_rank is None else '2.'}weight"
    first = head * (nope + rope)
    yield queries, slice(first, first + nope), math.sqrt(g)
    yield queries, slice(first + nope, first + nope + rope), g
    yield f"{prefix}.kv_up.weight", slice(head * (nope + v), head * (nope + v) + nope), math.sqrt(g)


@pytest.mark.parametrize("model", MODELS)
def test_logits_that_were_too_large_come_to_the_threshold(model: str) -> None:
    changes = [MTP, MODELS[model], STILL, {"data": {"micro_batch_size": 2}}]
    probe = tiny_trainer(tiny_config(*changes), (0,))
    seen = Seen(probe)
    probe.step()
    largest = seen.largest()
    every = sorted(value for layer in largest for value in layer)
    threshold = (every[len(every) // 2 - 1] + every[len(every) // 2]) / 2
    assert seen.largest(with_padding=True) != largest, "padding would make no difference"

    trainer = tiny_trainer(tiny_config(*changes, clip(threshold)), (0,))
    seen, before = Seen(trainer), weights(trainer)
    report = trainer.step()
    assert report.metrics["attention/logit_max"] == pytest.approx(every[-1], rel=1e-5)
    assert report.metrics["train/qk_clipped_heads"] == sum(value > threshold for value in every) > 0
    for layer, after in zip(largest, seen.largest(), strict=True):
        assert after == pytest.approx([min(value, threshold) for value in layer], rel=2e-5)

    names = [*(f"layers.{i}.attention" for i in range(len(trainer.model.layers))), "mtp.block.attention"]
    for block, prefix, layer in zip(trainer.model.blocks(), names, largest, strict=True):
        for head, value in enumerate(layer):
            if value > threshold:
                for name, rows, factor in head_rows(block.attention, prefix, head, threshold / value):
                    got = weights(trainer)[name][rows]
                    torch.testing.assert_close(got, before[name][rows] * factor, rtol=1e-5, atol=0)
                    before[name][rows] = got
    for name, weight in weights(trainer).items():
        assert same_bits(weight, before[name]) or name.endswith("bias_E"), name


def test_nothing_to_clip_changes_not_a_bit() -> None:
    metrics, after = trained([{"stability": {"qk_clip": {"kind": "max_logit"}}}])
    for step in metrics:
        assert 0.0 < step.pop("attention/logit_max") < 100.0
        assert step.pop("train/qk_clipped_heads") == 0.0
    plain = trained([])
    for step in plain[0]:
        step.pop("attention/logit_max", None)
    assert_bit_identical((metrics, after), plain)


def test_forwards_without_gradients_do_not_count() -> None:
    trainer = tiny_trainer(tiny_config(MTP, clip(100.0)))
    technique, batch = technique_of(trainer), trainer.batches(3)
    trainer.step()
    seen = technique.largest_LH.clone()
    assert seen.isfinite().all()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(2.0)
    trainer.evaluate(batch)
    measure(trainer.model, batch[0], trainer.ranks)
    with torch.no_grad():
        trainer.model(batch[0])
    assert technique.largest_LH.equal(seen)


def test_every_step_begins_anew() -> None:
    trainer = tiny_trainer(tiny_config(clip(1e-3), {"model": {"init": {"std": 0.5}}}))
    first, second = (trainer.step().metrics["attention/logit_max"] for _ in range(2))
    assert second < 0.1 * first


def test_the_figure_of_the_step_stands_against_that_of_one_micro_batch() -> None:
    changes = [clip(100.0), {"data": {"micro_batch_size": 2}}]
    measured, plain = (tiny_trainer(tiny_config(*changes, {"monitors": {"every_steps": n}})) for n in (1, 0))
    with_health, without = measured.step(), plain.step()
    assert with_health.health is not None
    name = "attention/logit_max"
    assert with_health.metrics[name] == without.metrics[name] != with_health.health.headline()[name]


def test_a_step_of_padding_alone_clips_nothing() -> None:
    trainer = tiny_trainer(tiny_config(clip(1e-6)))
    batches = trainer.batches
    for batch in (padding := batches(0)):
        object.__setattr__(batch, "real_BL", torch.zeros_like(batch.ids_BL, dtype=torch.bool))
    trainer.batches = lambda step: padding
    report = trainer.step()
    assert (report.taken, report.metrics["attention/logit_max"]) == (True, 0.0)
    assert report.metrics["train/qk_clipped_heads"] == 0.0


@pytest.mark.parametrize("attention", [{"kind": "mha"}, {"kind": "mla"}])
def test_normed_heads_are_refused(attention: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"attention\.qk_norm norms queries and keys.*set qk_clip\.kind=none"):
        tiny_config(clip(100.0), {"model": {"attention": {**attention, "qk_norm": True}}})


# ---- ranks -----------------------------------------------------------------------------------------------------------

# Thresholds that some heads reach in some steps (asserted below).
CASES: Cases = {
    "latent attention": [clip(0.02)],
    "plain attention, muon": [
        clip(0.05),
        {"model": {"attention": MHA}, "optimizer": {"kind": "muon", "lr": 2e-3, "eps": 1e-3}},
    ],
}


@functools.cache
def one_process() -> dict[str, Run]:
    return reference(CASES)


def test_the_cases_clip_some_heads_and_not_all() -> None:
    for name, run in one_process().items():
        clipped = [step["train/qk_clipped_heads"] for step in run.metrics]
        heads = 4 * (3 if "plain" in name else 2)
        assert any(0 < count < heads for count in clipped), (name, clipped)


@by_corner
def test_two_ranks_clip_as_one_process_does(division: str) -> None:
    assert_same_training(runs_of(CASES, division), one_process(), {})


def test_a_saved_state_continues_bit_for_bit() -> None:
    for broken in run_distributed(resumed, 2, CASES, DIVISIONS["ep2-sharded"], (1, 3), timeout_s=240):
        assert broken == []


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    for broken in run_distributed(refused, 2, CASES, DIVISIONS["ep2-sharded"]):
        assert broken == []


def test_bf16_clips_too() -> None:
    bf16 = {"precision": {"compute": "bf16"}}
    trainer = tiny_trainer(tiny_config(STILL, clip(1.0), bf16), PADDED)
    first, second = (trainer.step().metrics for _ in range(2))
    assert first["train/qk_clipped_heads"] > 0
    assert second["attention/logit_max"] < 0.6 * first["attention/logit_max"]
