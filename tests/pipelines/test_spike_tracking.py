"""Spike events as traces and as a table, in a real MLflow database and behind a real server."""

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Trace, TraceState

from pipelines import tracking
from pipelines.delivery import Delivery, deliver
from pipelines.run_folder import RunFolder, read_json
from pipelines.run_lock import RunBusyError
from pipelines.spike_tracking import COLUMNS, EventDelivery
from pipelines.tracking import Tracker
from pipelines.tracking_store import TrackingStore, open_store
from tests.pipelines.mlflow_server import Server, wait_until
from tests.pipelines.spiky import BEGAN_MS, outcome, record, spike
from tests.pipelines.tracked import DATASET, config, train


def traces(client: MlflowClient, folder: RunFolder, search: str | None = None) -> dict[str, Trace]:
    """The traces of a run by their event's id. Fails if an event has two."""
    found = client.search_traces(locations=[folder.info.experiment_id], run_id=folder.info.id, filter_string=search)
    ids = [trace.info.tags["spike.id"] for trace in found]
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, found, strict=True))


def table(client: MlflowClient, folder: RunFolder, to: Path) -> list[dict[str, Any]]:
    """The rows of a run's table, after checking that the UI would know it for one."""
    tag = client.get_run(folder.info.id).data.tags["mlflow.loggedArtifacts"]
    assert json.loads(tag) == [{"path": "spikes.json", "type": "table"}]
    to.mkdir(exist_ok=True)
    content = json.loads(Path(client.download_artifacts(folder.info.id, "spikes.json", str(to))).read_text())
    assert content.keys() == {"columns", "data"}
    assert content["columns"] == list(COLUMNS)
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def unfinished(store: TrackingStore) -> tuple[Tracker, EventDelivery]:
    """A run that is on, and its events' delivery. Not entered: the tracker's own thread would deliver beside it."""
    tracker = Tracker.start(config(), store, dataset=DATASET)
    return tracker, EventDelivery(store.client, tracker.folder)


def check_trace(trace: Trace, run_id: str) -> None:
    """That a trace says of ``spike(100)``, recovered, what a person wants to know."""
    info = trace.info
    assert (info.request_time, info.execution_duration) == (BEGAN_MS + 100_000, 2500)
    assert info.state == TraceState.OK
    assert info.trace_metadata["mlflow.sourceRun"] == run_id
    assert {name: value for name, value in info.tags.items() if name.startswith("spike.")} == {
        "spike.id": "loss-000100",
        "spike.kind": "loss",
        "spike.step": "100",
        "spike.action": "rewind_skip_samples",
        "spike.outcome": "recovered",
    }
    assert info.request_preview == "step 100: loss spike, 9.125 where 3.25 was to be expected, score 41.0"
    assert info.response_preview == (
        "training went back to step 94, and leaves the samples since the onset out; "
        "recovered at step 150; 6 steps lost in 2.5 s"
    )
    root, *children = sorted(trace.data.spans, key=lambda span: span.parent_id is not None)
    assert (root.name, root.parent_id) == ("loss-000100", None)
    spans = {span.name: span for span in children}
    assert spans.keys() == {"detect", "diagnose", "answer"}
    assert all(span.parent_id == root.span_id for span in children)
    assert all(span.start_time_ns == (BEGAN_MS + 100_000) * 10**6 for span in trace.data.spans)
    detected, diagnosed, answered = (spans[name].attributes for name in ("detect", "diagnose", "answer"))
    expected = {"value": 9.125, "baseline": 3.25, "score": 41.0, "threshold": 12.0, "onset": 99}
    assert {name: detected[name] for name in expected} == expected
    assert diagnosed["samples"] == [5, 0]
    assert diagnosed["documents"] == ["a/000.txt", "b/c/001.txt"]
    assert [(layer["layer"], layer["max_vio"]) for layer in diagnosed["layers"]] == [(1, 0.5), (2, 0.25)]
    assert diagnosed["grad_norms"] == {"dense": 2.5, "experts": 40.0, "router": None}
    assert (answered["action"], answered["rewound_to"]) == ("rewind_skip_samples", 94)
    assert (answered["state"], answered["steps_lost"]) == ("recovered", 6)


def test_an_event_is_sent_once_its_outcome_is_final(store: TrackingStore, tmp_path: Path) -> None:
    tracker, delivery = unfinished(store)
    folder, client = tracker.folder, store.client
    record(folder, spike(100))
    record(folder, spike(200), outcome("open", 210))
    delivery.send(ended=False)
    assert traces(client, folder) == {}
    assert delivery.left() == 2
    record(folder, spike(100), outcome("recovered", 150))
    delivery.send(ended=False)
    (trace,) = traces(client, folder).values()
    check_trace(trace, folder.info.id)
    # What the run ends with is sent as it stands; what a resumed run makes of it is the same trace.
    delivery.send(ended=True)
    assert delivery.left() == 0
    assert traces(client, folder)["loss-000200"].info.tags["spike.outcome"] == "open"
    record(folder, spike(200), outcome("aborted", 220, steps_lost=0))
    assert delivery.left() == 1
    delivery.send(ended=True)
    last = traces(client, folder)["loss-000200"]
    assert (last.info.tags["spike.outcome"], last.info.state) == ("aborted", TraceState.ERROR)
    assert last.info.response_preview is not None
    assert last.info.response_preview.endswith("; not recovered by step 220")
    assert [row["outcome"] for row in table(client, folder, tmp_path / "down")] == ["recovered", "aborted"]
    with tracker:
        pass


def test_traces_are_found_by_their_tags_and_in_the_run_alone(store: TrackingStore) -> None:
    first, delivery = unfinished(store)
    second, other = unfinished(store)
    record(first.folder, spike(100), outcome("recovered", 150))
    non_finite = spike(300, id="non_finite-000300", kind="non_finite", value=None, score=None, action="skip_step")
    record(first.folder, non_finite, outcome("relapsed", 305, steps_lost=1))
    record(second.folder, spike(100), outcome("recovered", 150))
    delivery.send(ended=False)
    other.send(ended=False)
    for search, found in (
        ("tags.`spike.kind` = 'non_finite'", {"non_finite-000300"}),
        ("tags.`spike.action` = 'rewind_skip_samples'", {"loss-000100"}),
        ("tags.`spike.step` = '100'", {"loss-000100"}),
        ("trace.name = 'loss-000100'", {"loss-000100"}),
    ):
        assert traces(store.client, first.folder, search).keys() == found
    relapsed = traces(store.client, first.folder)["non_finite-000300"]
    assert relapsed.info.request_preview == "step 300: loss or gradient not finite"
    assert relapsed.info.state == TraceState.ERROR
    assert traces(store.client, second.folder).keys() == {"loss-000100"}


def test_a_crash_at_any_point_leaves_one_whole_trace(store: TrackingStore, tmp_path: Path) -> None:
    with Tracker.start(config(), store, dataset=DATASET) as tracker:
        folder = tracker.folder
        record(folder, spike(100), outcome("recovered", 150))
        record(folder, spike(200))
    assert tracker.undelivered is None
    known = read_json(folder.traced)
    # After a trace's head and before its spans, and before either was remembered.
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("DELETE FROM spans")
        database.commit()
    folder.traced.unlink()
    assert Delivery(store.client, folder).events_left() == 2
    assert deliver(folder) is None
    assert read_json(folder.traced) == known
    check_trace(traces(store.client, folder)["loss-000100"], folder.info.id)
    assert [row["event"] for row in table(store.client, folder, tmp_path / "down")] == [1, 2]


def test_the_table_has_a_row_an_event_and_the_same_columns_in_every_run(store: TrackingStore, tmp_path: Path) -> None:
    many = spike(7, samples=range(100, 140), documents=[f"corpus/{n}.txt" for n in range(40)])
    with Tracker.start(config(), store, dataset=DATASET) as tracker:
        record(tracker.folder, many, outcome("recovered", 60))
        died = {"kind": "worker_death", "id": "worker_death-000020", "action": "restart_workers"}
        bare = dict.fromkeys(("value", "baseline", "score", "rewound_to"))
        record(tracker.folder, spike(20, samples=(), documents=(), layers=(), **died, **bare))
    spiky, death = table(store.client, tracker.folder, tmp_path / "down")
    assert [spiky[column] for column in COLUMNS[:11]] == [
        *(1, "loss", 7, 9.125, 3.25, 41.0, "rewind_skip_samples", "recovered", 6, 2.5, 1)
    ]
    assert spiky["samples"] == "100, 101, 102, 103, 104, 105, 106, 107 and 32 more"
    assert spiky["documents"].startswith("0.txt, 1.txt, ")
    assert [death[column] for column in COLUMNS[:11]] == [
        *(2, "worker_death", 20, None, None, None, "restart_workers", "open", None, None, None)
    ]
    assert len(traces(store.client, tracker.folder)) == 2


def test_a_run_without_events_has_neither_traces_nor_a_table(store: TrackingStore) -> None:
    with Tracker.start(config(), store, dataset=DATASET) as tracker:
        train(tracker.folder, 1, 10)
    run = store.client.get_run(tracker.info.id)
    assert traces(store.client, tracker.folder) == {}
    assert "mlflow.loggedArtifacts" not in run.data.tags
    assert "spikes.json" not in {file.path for file in store.client.list_artifacts(run.info.run_id)}
    assert not tracker.folder.traced.exists()
    assert {name: run.data.metrics[name] for name in ("final/spikes", "final/steps_lost")} == {
        "final/spikes": 0.0,
        "final/steps_lost": 0.0,
    }
    assert "spike" not in run.data.tags["mlflow.note.content"]


def test_a_run_ends_with_the_number_of_its_spikes_and_what_they_cost(store: TrackingStore) -> None:
    with Tracker.start(config(), store, dataset=DATASET) as tracker:
        train(tracker.folder, 1, 10)
        record(tracker.folder, spike(3), outcome("recovered", 8))
        record(tracker.folder, spike(9, id="grad_norm-000009", kind="grad_norm"), outcome("open", 10, steps_lost=1))
        record(tracker.folder, spike(10, id="checkpoint_failed-000010", kind="checkpoint_failed", action="go_on"))
    run = store.client.get_run(tracker.info.id)
    assert (run.data.metrics["final/spikes"], run.data.metrics["final/steps_lost"]) == (2.0, 7.0)
    (point,) = store.client.get_metric_history(run.info.run_id, "final/spikes")
    assert point.step == 0
    first, empty, spikes = run.data.tags["mlflow.note.content"].splitlines()
    assert first.startswith("Trained a ")
    assert (empty, spikes) == ("", "2 spikes (1 loss, 1 grad_norm), 7 steps lost.")


def test_another_default_store_of_the_process_gets_nothing(
    store: TrackingStore, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = empty_database.read_bytes()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{empty_database}")
    with Tracker.start(config(), store, dataset=DATASET) as tracker:
        record(tracker.folder, spike(3), outcome("recovered", 8))
    assert traces(store.client, tracker.folder).keys() == {"loss-000003"}
    assert empty_database.read_bytes() == before
    assert mlflow.active_run() is None


@pytest.mark.slow
def test_events_reach_a_server_and_those_that_a_dead_one_missed_are_told_of(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT_S", 2.0)
    with Tracker.start(config(), open_store(server.uri), dataset=DATASET) as tracker:
        folder, client = tracker.folder, tracker.store.client
        record(folder, spike(100), outcome("recovered", 150))
        wait_until(lambda: "loss-000100" in read_json(folder.traced).get("traces", {}))
        check_trace(traces(client, folder)["loss-000100"], folder.info.id)
        server.kill()
        record(folder, spike(200))
    assert tracker.undelivered is not None
    # Of the first event the table does not say yet what its trace says; the outage is the third.
    assert re.match(r"the ending and 3 spike events of run run-1 could not be", tracker.undelivered)
    server.start()
    wait_until(lambda: deliver_or_busy(folder))
    check_trace(traces(client, folder)["loss-000100"], folder.info.id)
    assert traces(client, folder)["loss-000200"].info.tags["spike.outcome"] == "open"
    rows = {row["kind"]: row["step"] for row in table(client, folder, tmp_path / "down")}
    assert rows == {"loss": 200, "tracking_outage": 0}
    assert len(table(client, folder, tmp_path / "again")) == 3


def deliver_or_busy(folder: RunFolder) -> bool:
    """Whether everything could be delivered; the run stays locked while a request of its own thread is under way."""
    try:
        return deliver(folder) is None
    except RunBusyError:
        return False
