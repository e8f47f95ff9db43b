"""The saved views as MLflow keeps them; what the UI makes of them is in test_ui.py."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.utils.validation import MAX_EXPERIMENT_TAG_VAL_LENGTH

from pipelines import views
from pipelines.ending import ending_of
from pipelines.flatten import flatten
from pipelines.outbox import Outbox
from pipelines.run_folder import RunFolder
from pipelines.saved_view import BarChart, LineChart, Section, View, read_state
from pipelines.spool import SpoolReader
from pipelines.tracking_store import TrackingStore
from pipelines.views import HEALTH, ROUTING, SPIKES, TECHNIQUES, TRAINING, VIEWS, publish_views
from tests.pipelines.small_run import run_loop, small_config

NOTE = "mlflow.note.content"


MONITORED = ("monitors.every_steps=4",)
# Every technique that has figures of its own; they go together.
WITH_TECHNIQUES = (
    *MONITORED,
    "model.moe={num_experts: 4, top_k: 3, num_identity_experts: 2, experts_per_token: 2.0}",
    "model.residual.kind=mhc",
    "stability.balance={kind: budget, bias_update_rate: 1.0e-2}",
    "stability.anticipation={kind: always, lag: 2}",
    "stability.qk_clip.kind=max_logit",
    "precision.fp8.kind=deepseek_v3",
    "parallel.expert_nodes=2",
)


# Limits that noise exceeds: training goes back once, and then the run is ended.
WITH_SPIKES = (
    "schedule.steps=60",
    "detector={kind: robust, warn: 1.0, act: 1.0}",
    "response.rungs=[rewind_skip_samples]",
)


@pytest.mark.parametrize(
    ("seen", "settings"),
    [((TRAINING, ROUTING, HEALTH), MONITORED), ((SPIKES,), WITH_SPIKES), ((TECHNIQUES,), WITH_TECHNIQUES)],
)
@pytest.mark.usefixtures("home")
def test_a_run_records_every_metric_and_parameter_that_is_on_a_view(
    tmp_path: Path, seen: tuple[View, ...], settings: tuple[str, ...]
) -> None:
    folder = RunFolder(tmp_path / "run")
    run_loop(0, 1, folder.path, settings)
    outbox = Outbox(0, {})
    outbox.add(SpoolReader(folder.spool).read())
    recorded = {name for record in outbox.due(everything=True) for name in record.metrics}
    recorded |= ending_of(folder, None, "FINISHED", None)["metrics"].keys()
    columns = {f"metrics.{name}" for name in recorded} | {f"params.{name}" for name in flatten(small_config())}
    columns.add("attributes.Models")
    for view in seen:
        assert {chart.metric for section in view.sections for chart in section.charts} <= recorded
        assert set(view.columns) <= columns
        # One-dot lines, or a bar of the last step alone, tell nothing.
        for section in view.sections:
            for chart in section.charts:
                assert isinstance(chart, BarChart) == chart.metric.startswith("final/")


def test_the_views_fit_into_a_tag_and_differ_in_key_and_name() -> None:
    assert all(len(view.to_tag(10**13, 10**13)) < MAX_EXPERIMENT_TAG_VAL_LENGTH / 4 for view in VIEWS)
    assert len({view.key for view in VIEWS}) == len({view.name for view in VIEWS}) == len(VIEWS)
    for view in VIEWS:
        ids = [part["uuid"] for kind in ("compareRunSections", "compareRunCharts") for part in view.to_state()[kind]]
        assert len(set(ids)) == len(ids)


def test_a_view_groups_runs_by_a_tag_as_the_ui_does() -> None:
    keys = [{"mode": "tag", "groupByData": "arm"}]
    state = replace(TRAINING, group_tag="arm").to_state()
    assert (state["groupBy"], state["useGroupedValuesInCharts"]) == (
        {"aggregateFunction": "average", "groupByKeys": keys},
        True,
    )
    assert "groupBy" not in TRAINING.to_state()


def test_a_view_is_a_tag_of_the_form_that_the_ui_reads() -> None:
    view = View(
        key="mine",
        name="My view",
        sections=(Section("1 First", (LineChart("a/b", "log"),)), Section("2 Second", (BarChart("final/c"),))),
        columns=("metrics.final/c", "params.seed"),
        search="params.seed = '1'",
    )
    tag = json.loads(view.to_tag(5, 7))
    assert (tag["name"], tag["createdAt"], tag["updatedAt"]) == ("My view", 5, 7)
    state = read_state(view.to_tag(5, 7))
    assert (state["searchFilter"], state["orderByKey"], state["orderByAsc"]) == (
        "params.seed = '1'",
        "attributes.`Created`",
        False,
    )
    assert state["selectedColumns"] == ["metrics.`final/c`", "params.`seed`"]
    first, second = state["compareRunSections"]
    assert (first["name"], second["name"]) == ("1 First", "2 Second")
    line, bar = state["compareRunCharts"]
    assert (line["type"], line["metricKey"], line["scaleType"]) == ("LINE", "a/b", "log")
    assert (bar["type"], bar["metricKey"]) == ("BAR", "final/c")
    assert (line["metricSectionId"], bar["metricSectionId"]) == (first["uuid"], second["uuid"])
    # What a user has saved in the UI may be plain.
    assert read_state(json.dumps({"name": "x", "state": json.dumps({"groupBy": None})})) == {"groupBy": None}


@pytest.mark.parametrize("broken", ["", "{", "[]", "{}", '{"state": 7}', '{"state": "deflate;AAAA"}', '{"state": "x"}'])
def test_a_tag_that_is_no_view_is_told_from_one(broken: str) -> None:
    with pytest.raises(ValueError):
        read_state(broken)


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
    monkeypatch.setattr(views, "VIEWS", (changed, ROUTING))
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
    monkeypatch.setattr(views, "VIEWS", (replace(TRAINING, key="more", name="More"), *VIEWS))
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
