"""What the trainer shows the spike detector, and what becomes of the verdict."""

import math
from typing import Any

import torch

from moe.batch import Batch
from moe.config.trainer import TrainerConfig
from moe.parallel import join
from moe.report import Report
from moe.stability.detector import Reading
from moe.trainer import Trainer
from tests.distributed import run_distributed
from tests.moe.tiny import batches_of, load, saved, tiny_config, tiny_trainer

# With the default window the past would hold the whole descent of so short a run.
QUICK: dict[str, Any] = {"detector": {"kind": "robust", "window": 25}, "schedule": {"steps": 60}}
SPOILED = 45


def spoiled_trainer(config: TrainerConfig) -> Trainer:
    """One whose batch of one step is the rarest token alone."""
    ranks = join(config.parallel)
    batches = batches_of(config, ranks.rank)

    def source(step: int) -> list[Batch]:
        return [Batch(torch.full_like(b.ids_BL, 47)) for b in batches(step)] if step == SPOILED else list(batches(step))

    return Trainer(config, ranks, source)


def acted(reports: list[Report]) -> dict[int, set[str]]:
    """Series that ask for an answer, by step (from 0)."""
    asking: dict[int, set[str]] = {
        r.step - 1: {reading.series for reading in r.readings if reading.severity == "act"} for r in reports
    }
    return {step: series for step, series in asking.items() if series}


def test_a_spoiled_batch_is_seen_at_its_step_and_clean_ones_are_not() -> None:
    trainer = spoiled_trainer(tiny_config(QUICK))
    reports = [trainer.step() for _ in range(60)]
    assert acted(reports) == {SPOILED: {"loss", "grad_norm"}}
    assert reports[SPOILED].metrics["spike/score_loss"] > 6
    assert all("spike/score_loss" not in report.metrics for report in reports[:29])  # no past to speak of


def test_the_detector_sees_the_gradient_norm_before_it_is_clipped() -> None:
    trainer = spoiled_trainer(tiny_config(QUICK, {"stability": {"clip": {"kind": "global", "max_norm": 1e-3}}}))
    for report in (trainer.step() for _ in range(SPOILED + 1)):
        norm = next(reading for reading in report.readings if reading.series == "grad_norm")
        assert norm.value == report.metrics["train/grad_norm"] > 1e-3
    assert norm.severity != "none"


def readings_on(rank: int, world: int) -> list[tuple[Reading, ...]]:
    trainer = spoiled_trainer(tiny_config(QUICK, {"parallel": {"workers": world, "expert_parallel": world}}))
    return [trainer.step().readings for _ in range(SPOILED + 5)]


def test_ranks_come_to_the_same_verdict_bit_for_bit() -> None:
    one, other = run_distributed(readings_on, 2)
    assert one == other
    assert {reading.severity for reading in one[SPOILED]} == {"act"}


def test_a_rewind_rewinds_the_detector() -> None:
    trainer = spoiled_trainer(tiny_config(QUICK))
    for _ in range(SPOILED - 2):
        trainer.step()
    tensors, scalars = saved(trainer)
    first = [trainer.step().readings for _ in range(10)]
    load(trainer, tensors, scalars)
    assert [trainer.step().readings for _ in range(10)] == first
    resumed = spoiled_trainer(tiny_config(QUICK, {"seed": 9}))
    load(resumed, tensors, scalars)
    assert [resumed.step().readings for _ in range(10)] == first


def test_without_a_detector_only_what_is_not_finite_is_noticed() -> None:
    trainer = spoiled_trainer(tiny_config({"detector": {"kind": "none"}, "schedule": {"steps": 60}}))
    reports = [trainer.step() for _ in range(SPOILED + 1)]
    assert acted(reports) == {}
    assert not any(name.startswith("spike/") for report in reports for name in report.metrics)
    with torch.no_grad():
        trainer.model.embed.weight.fill_(math.nan)
    report = trainer.step()
    assert not report.taken
    assert {reading.severity for reading in report.readings} == {"act"}


def test_a_step_that_was_not_finite_is_no_part_of_the_past() -> None:
    disturbed = tiny_trainer(tiny_config(QUICK))
    for _ in range(35):
        disturbed.step()
    past = {name: t.clone() for name, t in disturbed.state().tensors.items() if name.startswith("detector.")}
    weight = disturbed.model.embed.weight
    before = weight.detach().clone()
    weight.data.fill_(math.nan)
    assert not disturbed.step().taken
    tensors = disturbed.state().tensors
    assert len(past) == 6
    assert all(torch.equal(tensors[name], tensor) for name, tensor in past.items())
    weight.data.copy_(before)
    assert all(reading.score is not None for reading in disturbed.step().readings)
