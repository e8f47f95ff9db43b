"""Saved views on their way into an experiment, in a real store."""

import json
import logging
from dataclasses import replace

import pytest

from pipelines import view_publishing
from pipelines.saved_view import read_state
from pipelines.sweep_view import SweptKey, sweep_view
from pipelines.tracking_store import TrackingStore
from pipelines.view_publishing import publish_sweep_view, publish_views
from pipelines.views import ROUTING, TRAINING, VIEWS

NOTE = "mlflow.note.content"
RATE = SweptKey("optimizer.lr", "number")


def test_views_are_written_once_and_again_when_they_change(
    store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = store.experiment_id("steadymoe")

    def tags() -> dict[str, str]:
        return dict(store.client.get_experiment(experiment).tags)

    publish_views(store.client, experiment)
    first = tags()
    assert {view.tag for view in VIEWS} <= first.keys()
    assert read_state(first[TRAINING.tag]) == TRAINING.to_state()
    publish_views(store.client, experiment)
    assert tags() == first
    store.client.set_experiment_tag(experiment, ROUTING.tag, "{broken")
    changed = replace(TRAINING, search="")
    monkeypatch.setattr(view_publishing, "VIEWS", (changed, ROUTING))
    publish_views(store.client, experiment)
    assert read_state(tags()[TRAINING.tag]) == changed.to_state()
    assert read_state(tags()[ROUTING.tag]) == ROUTING.to_state()


def test_the_description_leads_to_the_views_unless_somebody_has_written_one(
    store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = store.experiment_id("steadymoe")

    def description() -> str:
        return str(store.client.get_experiment(experiment).tags[NOTE])

    publish_views(store.client, experiment)
    for view in VIEWS:
        assert f"[{view.name}](#/experiments/{experiment}/runs?" in description()
    monkeypatch.setattr(view_publishing, "VIEWS", (replace(TRAINING, key="more", name="More"), *VIEWS))
    publish_views(store.client, experiment)
    assert "[More](#/" in description()
    store.client.set_experiment_tag(experiment, NOTE, "Ours")
    publish_views(store.client, experiment)
    assert description() == "Ours"


def test_a_store_that_refuses_costs_a_warning_and_nothing_more(
    store: TrackingStore, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        publish_views(store.client, "4711")
    assert "saved views of the MLflow UI are not up to date: No Experiment with id=4711" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        publish_sweep_view(store.client, "4711", sweep_view("a", "mine", [RATE]))
    assert "saved views of the MLflow UI are not up to date: No Experiment with id=4711" in caplog.text


def test_the_newest_sweeps_keep_their_views(store: TrackingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = store.experiment_id("steadymoe")
    monkeypatch.setattr(view_publishing, "MOST_SWEEPS", 2)

    def sweeps() -> dict[str, str]:
        tags = store.client.get_experiment(experiment).tags
        return {
            tag.removeprefix("mlflow.sharedViewState.sweep-"): text for tag, text in tags.items() if "sweep-" in tag
        }

    def publish(parent: str, keys: tuple[SweptKey, ...] = (RATE,)) -> None:
        publish_sweep_view(store.client, experiment, sweep_view(parent, "mine", keys))

    publish_views(store.client, experiment)
    publish("a")
    publish("b")
    first = sweeps()
    publish("b")
    assert sweeps() == first
    assert first.keys() == {"a", "b"}
    # A view that is brought up to date stays as old as it is; one that nobody can read is the oldest.
    publish("a", (RATE, SweptKey("schedule.warmup_steps", "number")))
    changed = sweeps()
    assert changed["a"] != first["a"]
    assert json.loads(changed["a"])["createdAt"] == json.loads(first["a"])["createdAt"]
    publish("c")
    assert sweeps().keys() == {"b", "c"}
    store.client.set_experiment_tag(experiment, "mlflow.sharedViewState.sweep-c", "{broken")
    publish("d")
    assert sweeps().keys() == {"b", "d"}
    assert {view.tag for view in VIEWS} <= store.client.get_experiment(experiment).tags.keys()
