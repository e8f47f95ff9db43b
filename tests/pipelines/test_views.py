"""The saved views as MLflow keeps them; what the UI makes of them is in test_ui.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.utils.validation import MAX_EXPERIMENT_TAG_VAL_LENGTH

from pipelines.ending import ending_of
from pipelines.flatten import flatten
from pipelines.outbox import Outbox
from pipelines.run_folder import RunFolder
from pipelines.saved_view import (
    BarChart,
    ContourChart,
    LineChart,
    ParallelChart,
    ScatterChart,
    Section,
    View,
    read_state,
)
from pipelines.spool import SpoolReader
from pipelines.sweep_view import FIGURES, LOAD_BY_LAYER, SWEEPS
from pipelines.views import HEALTH, ROUTING, SPIKES, TECHNIQUES, TRAINING, VIEWS
from tests.pipelines.small_run import run_loop, small_config

MONITORED = ("monitors.every_steps=4", "tracking.per_layer=true")
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


BY_LAYER = {chart.metric for chart in LOAD_BY_LAYER}

# Limits that noise exceeds: training goes back once, and then the run is ended.
WITH_SPIKES = (
    "schedule.steps=60",
    "detector={kind: robust, warn: 1.0, act: 1.0}",
    "response.rungs=[rewind_skip_samples]",
)


@pytest.mark.parametrize(
    ("seen", "settings"),
    [((TRAINING, ROUTING, HEALTH), MONITORED), ((SPIKES, SWEEPS), WITH_SPIKES), ((TECHNIQUES,), WITH_TECHNIQUES)],
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
    # The engine of sweeps adds to what a run records.
    recorded |= set(FIGURES)
    # For models of more layers.
    may_lack = {chart.metric for chart in LOAD_BY_LAYER[1:]} if "tracking.per_layer=true" in settings else BY_LAYER
    columns = {f"metrics.{name}" for name in recorded} | {f"params.{name}" for name in flatten(small_config())}
    columns |= {"attributes.Models", "tags.sweep", "tags.outcome"}
    for view in seen:
        charts = [chart for section in view.sections for chart in section.charts]
        assert {metric for chart in charts for metric in chart.metrics} - may_lack <= recorded
        assert set(view.columns) <= columns
        # One-dot lines, or a bar of the last step alone, tell nothing.
        for chart in charts:
            if isinstance(chart, BarChart | LineChart):
                assert isinstance(chart, BarChart) == chart.metric.startswith(("final/", "sweep/"))


def test_the_views_fit_into_a_tag_and_differ_in_key_and_name() -> None:
    assert all(len(view.to_tag(10**13, 10**13)) < MAX_EXPERIMENT_TAG_VAL_LENGTH / 4 for view in VIEWS)
    assert len({view.key for view in VIEWS}) == len({view.name for view in VIEWS}) == len(VIEWS)
    for view in VIEWS:
        ids = [part["uuid"] for kind in ("compareRunSections", "compareRunCharts") for part in view.to_state()[kind]]
        assert len(set(ids)) == len(ids)


def test_a_chart_has_the_fields_that_the_ui_reads() -> None:
    line = LineChart("train/loss", "log", marks="spike/loss_at_spike")
    assert (line.title, line.metrics) == ("train/loss vs spike/loss_at_spike", ("train/loss", "spike/loss_at_spike"))
    assert line.to_state()["selectedMetricKeys"] == ["train/loss", "spike/loss_at_spike"]
    parallel = ParallelChart(("optimizer.lr",), ("a/b", "c/d")).to_state()
    assert (parallel["type"], parallel["showAllRuns"]) == ("PARALLEL", True)
    assert (parallel["selectedParams"], parallel["selectedMetrics"]) == (["optimizer.lr"], ["a/b", "c/d"])
    lr, loss = {"key": "optimizer.lr", "type": "PARAM"}, {"key": "final/loss", "type": "METRIC"}
    scatter = ScatterChart("params.optimizer.lr", "metrics.final/loss")
    assert scatter.metrics == ("final/loss",)
    assert scatter.to_state() == {"type": "SCATTER", "xaxis": lr, "yaxis": loss}
    contour = ContourChart("params.optimizer.lr", "metrics.final/loss", "metrics.final/spikes").to_state()
    assert (contour["type"], contour["xaxis"], contour["yaxis"]) == ("CONTOUR", lr, loss)
    assert contour["zaxis"] == {"key": "final/spikes", "type": "METRIC"}


def test_a_view_shows_all_runs_or_the_first_ten() -> None:
    assert TRAINING.to_state()["runsHiddenMode"] == "FIRST_10_RUNS"
    assert replace(TRAINING, all_runs=True).to_state()["runsHiddenMode"] == "SHOW_ALL"


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
