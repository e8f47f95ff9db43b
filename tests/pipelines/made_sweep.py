"""A sweep as MLflow has it, made without training: a parent and trials with all that the view of a sweep shows."""

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from pipelines.sweep_view import FIGURES
from pipelines.views import run_colour

STEPS = 120
MOE_LAYERS = 2
RATES = (0.001, 0.003, 0.01)
WARM_UPS = (5, 20)
CLIPS = ("none", "global")
DIVERGED = "lr=0.01 warmup_steps=5 clip=none"
"""Ends at half the steps, with what its losses were before training."""
NAN = "lr=0.01 warmup_steps=20 clip=none"
"""Its last training loss is NaN for MLflow."""
WIDE = "lr=0.001 warmup_steps=5 clip=none"
"""Has 300 metrics more."""


def make_sweep(client: MlflowClient, experiment_id: str, name: str = "stability") -> str:
    """Id of the parent."""
    tags = {"mlflow.runName": name, "role": "sweep"}
    parent = str(client.create_run(experiment_id, tags=tags).info.run_id)
    for number, (label, params) in enumerate(configurations()):
        diverged = label == DIVERGED
        tags = {
            "mlflow.runName": f"{label} 0",
            "mlflow.parentRunId": parent,
            "mlflow.runColor": run_colour(number),
            "role": "sweep",
            "sweep": name,
            "configuration": label,
            "outcome": "diverged" if diverged else "finished",
            "diverged": str(diverged).lower(),
        }
        run = client.create_run(experiment_id, tags=tags)
        _record(client, run.info.run_id, label, params, number)
        client.set_terminated(run.info.run_id)
    client.set_terminated(parent)
    return parent


def configurations() -> Iterator[tuple[str, dict[str, Any]]]:
    """Labels, and the values of the keys that differ."""
    for rate, warm_up, clip in itertools.product(RATES, WARM_UPS, CLIPS):
        values: dict[str, Any] = {
            "optimizer.lr": rate,
            "schedule.warmup_steps": warm_up,
            "stability.clip.kind": clip,
            "stability.clip.max_norm": 1.0 if clip == "global" else None,
        }
        yield f"lr={rate:g} warmup_steps={warm_up} clip={clip}", values


def loss_at(step: int, label: str, rate: float) -> float:
    """Of a trial's training."""
    if label == NAN and step == STEPS:
        return math.nan
    spike = 3.0 if step in spike_steps(label) else 0.0
    climb = 0.05 * step if label == DIVERGED else 0.0
    return 2.0 + 3.5 * math.exp(-step * rate * 6) + spike + climb + 0.05 * math.sin(step)


def spike_steps(label: str) -> tuple[int, ...]:
    """Where a trial's loss spikes."""
    return tuple(s for s in (30, 31, 75) if s <= last_step(label)) if label in (DIVERGED, NAN) else ()


def last_step(label: str) -> int:
    """Where a trial ends."""
    return STEPS // 2 if label == DIVERGED else STEPS


def figures_of(label: str, params: Mapping[str, Any]) -> dict[str, float]:
    """What a trial records at its end."""
    rate, warm_up, diverged = params["optimizer.lr"], params["schedule.warmup_steps"], label == DIVERGED
    unclipped = params["stability.clip.kind"] == "none"
    loss = 5.55 if diverged else round(2.0 + abs(math.log10(rate / 0.003)) + 1 / warm_up + 0.1 * unclipped, 4)
    values = (
        loss + 10.0 * diverged,
        loss,
        round(0.4 + 100 * rate, 3),
        float(len(spike_steps(label))),
        float(2 * len(spike_steps(label))),
        float(diverged),
        float(last_step(label)),
    )
    return dict(zip(FIGURES, values, strict=True))


def _record(client: MlflowClient, run_id: str, label: str, params: Mapping[str, Any], number: int) -> None:
    now = time.time_ns() // 1_000_000
    points = [Metric(name, value, now, 0) for name, value in figures_of(label, params).items()]
    for step in range(1, last_step(label) + 1):
        loss = loss_at(step, label, params["optimizer.lr"])
        load = 0.3 + 2 * math.exp(-step / 20) + 0.02 * number
        metrics = {
            "train/loss": loss,
            "train/grad_norm": 1.0 + 5 * (step in spike_steps(label)),
            "moe/max_vio_batch": load,
            "spike/count": sum(spike <= step for spike in spike_steps(label)),
            **{f"moe_max_vio/layer_{layer:02}": load * (1 + 0.1 * layer) for layer in range(MOE_LAYERS)},
        }
        if step in spike_steps(label):
            metrics["spike/loss_at_spike"] = loss
        if step % 20 == 0:
            metrics |= {
                "val/loss": 2.0 + 3.5 * math.exp(-step * params["optimizer.lr"] * 6),
                "moe/max_vio_global": load,
            }
        points += [Metric(key, value, now, step) for key, value in metrics.items()]
    if label == WIDE:
        points += [
            Metric(f"health/layer_{i // 10:02}/figure_{i % 10}", i + step, now, step)
            for step in (1, 2)
            for i in range(300)
        ]
    texts = [Param(key, str(value)) for key, value in params.items() if value is not None]
    client.log_batch(run_id, params=[*texts, Param("seed", "0")])
    for start in range(0, len(points), 1000):
        client.log_batch(run_id, metrics=points[start : start + 1000])
