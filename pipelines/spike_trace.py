"""A spike event as a trace of MLflow: what the Traces pages of the UI show of it.

A trace has its event's own times, and ids that are made from the ids of run and event. So a trace that is sent again,
after a crash or because more is known of the event, is the same one.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines import spike_words
from pipelines.run_folder import RunInfo
from pipelines.spike_event import SpikeEvent

if TYPE_CHECKING:
    from mlflow.entities import Span, TraceInfo

# MLflow's limit.
_PREVIEW_LENGTH = 1000
_FAILED = ("relapsed", "aborted")


def trace_of(event: SpikeEvent, info: RunInfo) -> tuple["TraceInfo", list["Span"]]:
    """The trace of an event of a run: its head, and its spans, of which the first is the root of the others."""
    from mlflow.entities import TraceInfo, TraceLocation, TraceState

    # Given rather than drawn: what the tracing of a process would note by itself is noted here.
    from mlflow.tracing.constant import TRACE_SCHEMA_VERSION, TRACE_SCHEMA_VERSION_KEY

    failed = event.outcome is not None and event.outcome.state in _FAILED
    trace_id = _trace_id(event, info)
    head = TraceInfo(
        trace_id=f"tr-{trace_id.hex()}",
        trace_location=TraceLocation.from_experiment_id(info.experiment_id),
        request_time=event.time_ms,
        execution_duration=_duration_ms(event),
        state=TraceState.ERROR if failed else TraceState.OK,
        request_preview=spike_words.what(event)[:_PREVIEW_LENGTH],
        response_preview=f"{spike_words.answer(event)}; {spike_words.outcome(event)}"[:_PREVIEW_LENGTH],
        trace_metadata={"mlflow.sourceRun": info.id, TRACE_SCHEMA_VERSION_KEY: str(TRACE_SCHEMA_VERSION)},
        tags={
            "mlflow.traceName": event.id,
            "spike.id": event.id,
            "spike.kind": event.kind,
            "spike.step": str(event.step),
            "spike.action": event.action,
            "spike.outcome": spike_words.short_outcome(event),
        },
    )
    return head, _spans(event, trace_id, failed)


def _spans(event: SpikeEvent, trace_id: bytes, failed: bool) -> list["Span"]:
    record = event.model_dump(mode="json")
    detected = _of(record, "kind", "step", "value", "baseline", "score", "threshold", "onset", "tokens_seen")
    diagnosed = _of(record, "samples", "documents", "layers", "grad_norms", "metrics")
    answered = _of(record, "action", "detail", "rewound_to", "checkpoint")
    outcome = _of(record, "outcome")
    root = _span(event, trace_id, event.id, detected, {**answered, **outcome}, failed=failed)
    return [
        root,
        _span(event, trace_id, "detect", detected, {}, parent=event.id),
        _span(event, trace_id, "diagnose", {}, diagnosed, parent=event.id),
        _span(event, trace_id, "answer", answered, outcome.get("outcome", {}), parent=event.id, failed=failed),
    ]


def _of(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of the fields that say something."""
    return {name: record[name] for name in names if record[name] not in (None, "", [], {})}


def _span(
    event: SpikeEvent,
    trace_id: bytes,
    name: str,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    parent: str | None = None,
    failed: bool = False,
) -> "Span":
    """A span; the answer and the root take as long as the steps that were lost, the others no time."""
    from mlflow.entities import Span

    start_ns = event.time_ms * 1_000_000
    lasts_ms = 0 if name in ("detect", "diagnose") else _duration_ms(event)
    attributes = {
        "mlflow.traceRequestId": f"tr-{trace_id.hex()}",
        "mlflow.spanType": "UNKNOWN",
        "mlflow.spanInputs": inputs,
        "mlflow.spanOutputs": outputs,
        **inputs,
        **outputs,
    }
    return Span.from_dict(
        {
            "trace_id": base64.b64encode(trace_id).decode(),
            "span_id": base64.b64encode(_span_id(trace_id, name)).decode(),
            "parent_span_id": base64.b64encode(_span_id(trace_id, parent)).decode() if parent else "",
            "name": name,
            "start_time_unix_nano": start_ns,
            "end_time_unix_nano": start_ns + lasts_ms * 1_000_000,
            "status": {"code": "STATUS_CODE_ERROR" if failed else "STATUS_CODE_OK", "message": ""},
            # Each as JSON, as MLflow keeps them.
            "attributes": {key: json.dumps(value, ensure_ascii=False) for key, value in attributes.items()},
        }
    )


def _duration_ms(event: SpikeEvent) -> int:
    return 0 if event.outcome is None else round(1000 * event.outcome.seconds_lost)


def _trace_id(event: SpikeEvent, info: RunInfo) -> bytes:
    return hashlib.blake2b(f"{info.id}\0{event.id}".encode(), digest_size=16).digest()


def _span_id(trace_id: bytes, name: str) -> bytes:
    return hashlib.blake2b(trace_id + name.encode(), digest_size=8).digest()
