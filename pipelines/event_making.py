"""From a step that went wrong to its event."""

import math
from collections.abc import Mapping

from moe.config.detector import RobustDetectorConfig
from moe.hooks import Seen
from moe.layers.moe import MoeLayer
from moe.report import Report
from moe.stability.detector import Reading
from moe.trainer import Trainer
from pipelines.spike_event import Kind, LayerState, finite

_GROUP = "grad_norm/"


def kind_of(seen: Seen) -> Kind | None:
    """What went wrong in a step, the gravest first; None if nothing did."""
    if seen.differing:
        return "replica_mismatch"
    if not seen.is_finite:
        return "non_finite"
    acting = [reading.series for reading in seen.readings if reading.severity == "act"]
    return acting[0] if acting else None


def is_conspicuous(seen: Seen) -> bool:
    """Whether anything stands out, be it a warning."""
    return bool(seen.differing) or not seen.is_finite or any(r.severity != "none" for r in seen.readings)


def in_words(kind: Kind, seen: Seen) -> str:
    """What happened, in one line."""
    if kind == "replica_mismatch":
        names = ", ".join(seen.differing[:3]) + (" ..." if len(seen.differing) > 3 else "")
        return f"step {seen.step}: copies on several ranks differ of {len(seen.differing)} tensors ({names})"
    if kind == "non_finite":
        return f"step {seen.step}: loss or gradient is not finite"
    reading = _reading(kind, seen.readings)
    assert reading is not None
    assert reading.score is not None
    assert reading.baseline is not None
    what = "loss" if kind == "loss" else "gradient norm"
    return (
        f"step {seen.step}: {what} {reading.value:.4g} is {reading.score:.1f} robust standard deviations above the "
        f"{reading.baseline:.4g} that was to be expected"
    )


def describe_step(trainer: Trainer, kind: Kind, report: Report) -> dict[str, object]:
    """The fields of an event that are known of its step on any rank."""
    reading = _reading(kind, report.readings)
    config = trainer.config.detector
    threshold = config.act if isinstance(config, RobustDetectorConfig) and kind in ("loss", "grad_norm") else None
    metrics = {name: value for name, value in report.metrics.items() if math.isfinite(value)}
    return {
        "kind": kind,
        "step": report.step,
        "value": finite(reading.value) if reading else None,
        "baseline": reading.baseline if reading else None,
        "score": reading.score if reading else None,
        "threshold": threshold,
        "layers": _layers(trainer, report),
        "grad_norms": _groups(report.metrics),
        "metrics": {name: value for name, value in metrics.items() if not name.startswith(_GROUP)},
    }


def _reading(kind: Kind, readings: tuple[Reading, ...]) -> Reading | None:
    return next((reading for reading in readings if reading.series == kind), None)


def _groups(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name.removeprefix(_GROUP): finite(norm) for name, norm in metrics.items() if name.startswith(_GROUP)}


def _layers(trainer: Trainer, report: Report) -> tuple[LayerState, ...]:
    """Each MoE layer after the step."""
    numbers = [number for number, block in enumerate(trainer.model.blocks()) if isinstance(block.ffn, MoeLayer)]
    measured = {} if report.health is None else {moe.layer: moe for moe in report.health.moe}
    layers = []
    for index, number in enumerate(numbers):
        moe = measured.get(number)
        layers.append(
            LayerState(
                layer=number,
                max_vio=finite(report.layer_max_vio[index]),
                idle_experts=report.layer_idle[index],
                bias_abs_max=finite(float(trainer.routers[index].biases.abs().max())),
                router_logit_rms=finite(moe.router_logit_rms) if moe else None,
                expert_max=finite(moe.expert_max) if moe else None,
                expert_kurtosis=finite(moe.expert_kurtosis) if moe else None,
                residual_rms=finite(report.health.residual_rms[number]) if report.health else None,
                attention_logit_max=finite(report.health.attention_logit_max[number]) if report.health else None,
            )
        )
    return tuple(layers)
