import re
import threading
import time

import pytest

from pipelines import tracking
from pipelines.delivery import BATCH_METRICS, Delivery, deliver
from pipelines.run_folder import read_json, write_json
from pipelines.spike_event import read_events
from pipelines.spool import TRAIN, VALIDATION, SpoolWriter
from pipelines.tracking import Tracker
from pipelines.tracking_store import TrackingStore, open_store
from tests.pipelines.mlflow_server import Server, wait_until
from tests.pipelines.tracked import DATASET, checkpoint, checkpoints_in, config, points, train


def test_a_crash_after_sending_leaves_every_point_once(store: TrackingStore) -> None:
    with Tracker.start(config(), store, dataset=DATASET) as tracker:
        train(tracker.folder, 1, 600)
    steps = {TRAIN: 600, VALIDATION: 600}
    size = tracker.folder.spool.stat().st_size
    assert read_json(tracker.folder.delivered) == {"offset": size, "ended": True, "steps": steps}
    second_line = tracker.folder.spool.read_bytes().index(b"\n") + 1
    write_json(tracker.folder.delivered, {"offset": second_line, "ended": False})
    again = Delivery(store.client, tracker.folder)
    assert again.left() == 2 * 599 + 1
    again.send()
    assert again.left() == 0
    assert points(store.client, tracker.folder, "train/loss") == [(step, 5 / step) for step in range(1, 601)]
    assert points(store.client, tracker.folder, "final/loss") == [(0, 0.0083)]


def test_a_spool_that_is_another_file_than_the_delivered_one_is_sent_from_its_start(store: TrackingStore) -> None:
    with Tracker.start(config(), store, dataset=DATASET) as tracker:
        train(tracker.folder, 1, 30)
    for offset in (10, tracker.folder.spool.stat().st_size + 10):
        write_json(tracker.folder.delivered, {"offset": offset, "ended": True})
        again = Delivery(store.client, tracker.folder)
        assert again.left() == 2 * 30 + 1
        again.send()
    tracker.folder.spool.unlink()
    assert Delivery(store.client, tracker.folder).left() == 0
    assert points(store.client, tracker.folder, "train/loss") == [(step, 5 / step) for step in range(1, 31)]


def test_steps_that_were_taken_back_stand_apart_and_training_has_one_value_a_step(store: TrackingStore) -> None:
    with Tracker.start(config(), store, dataset=DATASET) as tracker:
        train(tracker.folder, 1, 40)
        delivery = Delivery(store.client, tracker.folder, lag_steps=15)
        delivery.send(everything=False)
        assert [step for step, _ in points(store.client, tracker.folder, "train/loss")] == list(range(1, 26))
        with SpoolWriter(tracker.folder.spool) as writer:
            writer.rewind(30)
            for step in range(31, 46):
                writer.write(TRAIN, step, {"train/loss": 7.0})
    assert points(store.client, tracker.folder, "train/loss") == [
        *((step, 5 / step) for step in range(1, 31)),
        *((step, 7.0) for step in range(31, 46)),
    ]
    assert points(store.client, tracker.folder, "rewound/loss") == [(step, 5 / step) for step in range(31, 41)]
    assert points(store.client, tracker.folder, "rewound/val_loss") == [(40, 6 / 40)]
    assert store.client.get_run(tracker.info.id).data.metrics["final/loss"] == 7.0


def test_a_record_above_the_limit_of_a_request_arrives(store: TrackingStore) -> None:
    metrics = {f"moe_load/expert_{number:04}": float(number) for number in range(2 * BATCH_METRICS + 1)}
    with Tracker.start(config(), store, dataset=DATASET) as tracker, SpoolWriter(tracker.folder.spool) as writer:
        writer.write(TRAIN, 1, metrics)
        writer.write(TRAIN, 2, {"train/loss": 1.0})
    assert tracker.undelivered is None
    arrived = store.client.get_run(tracker.info.id).data.metrics
    assert {name: value for name, value in arrived.items() if name in metrics} == metrics
    assert arrived["train/loss"] == 1.0


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_misses_nothing(server: Server) -> None:
    # Nothing waits for a rewind that may come.
    chosen = config(tracking={"uri": server.uri}, response={"kind": "record"})
    with Tracker.start(chosen, open_store(server.uri), dataset=DATASET) as tracker:
        folder = tracker.folder
        train(folder, 1, 100)
        wait_until(lambda: read_json(folder.delivered).get("offset") == folder.spool.stat().st_size)
        server.kill()
        train(folder, 101, 400)
        server.start()
        train(folder, 401, 600)
    assert tracker.undelivered is None
    client = tracker.store.client
    assert points(client, folder, "train/loss") == [(step, 5 / step) for step in range(1, 601)]
    assert points(client, folder, "val/loss") == [(100, 6 / 100), (400, 6 / 400), (600, 6 / 600)]
    run = client.get_run(tracker.info.id)
    assert run.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(tracker.info.id)} == {
        "config.yaml",
        "environment.json",
        "spikes.json",
    }


@pytest.mark.slow
def test_a_dead_server_is_noticed_within_moments_while_all_points_are_held_back(server: Server) -> None:
    with Tracker.start(config(), open_store(server.uri), dataset=DATASET) as tracker:
        folder = tracker.folder
        train(folder, 1, 10)  # fewer than a rewind may take back
        time.sleep(3)
        assert read_events(folder.events) == []
        server.kill()
        killed_at = time.time()
        wait_until(lambda: bool(read_events(folder.events)), 30)
        (event,) = read_events(folder.events)
        assert (event.kind, event.step) == ("tracking_outage", 10)
        assert event.time_ms / 1000 < killed_at + 3
        server.start()
    assert tracker.undelivered is None
    (event,) = read_events(folder.events)
    assert event.outcome is not None
    assert event.outcome.state == "recovered"


@pytest.mark.slow
def test_what_a_dead_server_did_not_get_is_told_and_delivered_later(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT_S", 2.0)
    with Tracker.start(config(), open_store(server.uri), dataset=DATASET) as tracker:
        server.kill()
        train(tracker.folder, 1, 600)
        checkpoint(tracker.folder, 600)
    assert tracker.undelivered is not None
    assert "\n" not in tracker.undelivered
    told = r"1,201 points and the ending and 1 checkpoint and 1 spike event of run run-1 could not be delivered"
    assert re.match(told, tracker.undelivered)
    assert "`steadymoe deliver run-1` sends them" in tracker.undelivered
    # The run stays locked for as long as a request of its own thread is under way.
    wait_until(lambda: "mlflow-delivery" not in {thread.name for thread in threading.enumerate()})
    server.start()
    assert deliver(tracker.folder) is None
    run = tracker.store.client.get_run(tracker.info.id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["final/loss"] == 0.0083
    assert len(points(tracker.store.client, tracker.folder, "train/loss")) == 600
    assert checkpoints_in(tracker.store.client, tracker.folder) == {
        "run-1-step00000600": {"train/loss": 5 / 600, "val/loss": 0.01}
    }
