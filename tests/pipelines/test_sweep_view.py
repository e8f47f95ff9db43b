"""The saved view of a sweep as MLflow keeps it; what the UI makes of it is in test_sweep_ui.py."""

from typing import Any

from mlflow.utils.validation import MAX_EXPERIMENT_TAG_VAL_LENGTH

from pipelines.flatten import flatten
from pipelines.saved_view import ParallelChart
from pipelines.sweep_view import FIGURES, SWEEPS, SweptKey, sweep_view, swept_keys
from tests.pipelines.small_run import small_config

LR = SweptKey("optimizer.lr", "number")
WARM_UP = SweptKey("schedule.warmup_steps", "number")
CLIP = SweptKey("stability.clip.kind", "text")
NORM = SweptKey("stability.clip.max_norm", "mixed")


def charts(keys: list[SweptKey]) -> dict[str, list[dict[str, Any]]]:
    """State of the charts by their types."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for chart in sweep_view("f00", "mine", keys).to_state()["compareRunCharts"]:
        kinds.setdefault(chart["type"], []).append(chart)
    return kinds


def titles(keys: list[SweptKey]) -> list[str]:
    return [section.title for section in sweep_view("f00", "mine", keys).sections]


def test_swept_keys_are_those_that_differ_each_with_the_kind_of_its_values() -> None:
    configs = [
        small_config("optimizer.lr=0.001", "stability.clip.kind=none"),
        small_config("optimizer.lr=0.01", "stability.clip.kind=global", "schedule.warmup_steps=5"),
    ]
    assert swept_keys(map(flatten, configs)) == (LR, WARM_UP, CLIP, NORM)


def test_a_key_with_texts_and_numbers_or_too_many_texts_is_mixed() -> None:
    values = [{"a": 1, "b": True, "c": str(i), "d": None if i else 1, "e": "x" if i else 1.5} for i in range(31)]
    values[0]["b"] = False
    assert swept_keys(values) == (
        SweptKey("b", "text"),
        SweptKey("c", "mixed"),
        SweptKey("d", "mixed"),
        SweptKey("e", "mixed"),
    )
    assert swept_keys([]) == ()


def test_the_view_has_the_trials_of_one_sweep_best_first_none_folded() -> None:
    view = sweep_view("f00", "stability-1", [LR, CLIP])
    state = view.to_state()
    assert view.tag == "mlflow.sharedViewState.sweep-f00"
    assert view.name == "Sweep stability-1"
    assert state["searchFilter"] == "tags.`mlflow.parentRunId` = 'f00'"
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`sweep/objective`", True)
    assert state["runsHiddenMode"] == "SHOW_ALL"
    for column in ("params.`optimizer.lr`", "params.`stability.clip.kind`", "tags.`outcome`"):
        assert column in state["selectedColumns"]
    assert {f"metrics.`{figure}`" for figure in FIGURES} <= set(state["selectedColumns"])


def test_keys_are_on_the_charts_that_the_ui_can_draw_for_them() -> None:
    drawn = charts([LR, WARM_UP, CLIP, NORM])
    (parallel,) = drawn["PARALLEL"]
    # With a mixed one, the UI would leave out trials.
    assert parallel["selectedParams"] == ["optimizer.lr", "schedule.warmup_steps", "stability.clip.kind"]
    assert parallel["selectedMetrics"][-1] == "sweep/val_loss"
    assert [chart["xaxis"]["key"] for chart in drawn["SCATTER"]] == ["optimizer.lr", "schedule.warmup_steps"]
    (contour,) = drawn["CONTOUR"]
    assert [contour[axis]["key"] for axis in ("xaxis", "yaxis", "zaxis")] == [
        "optimizer.lr",
        "schedule.warmup_steps",
        "sweep/val_loss",
    ]
    assert drawn["LINE"][0]["selectedMetricKeys"] == ["train/loss", "spike/loss_at_spike"]
    assert [chart["metricKey"] for chart in drawn["BAR"]] == list(FIGURES)


def test_a_sweep_of_one_number_has_no_contour_and_one_of_texts_no_section_by_key() -> None:
    assert charts([LR]).keys() == {"LINE", "PARALLEL", "SCATTER", "BAR"}
    assert "3 Key by key" in titles([LR])
    assert charts([CLIP]).keys() == {"LINE", "PARALLEL", "BAR"}
    assert titles([CLIP])[2] == "3 On the way"


def test_the_largest_view_fits_into_a_tag() -> None:
    keys = [SweptKey(f"stability.some_technique_{i}.some_coefficient", "number") for i in range(60)]
    view = sweep_view("0123456789abcdef" * 2, "a-name-that-somebody-has-chosen", keys)
    assert len(view.to_tag(10**13, 10**13)) < MAX_EXPERIMENT_TAG_VAL_LENGTH / 2
    (parallel,) = [chart for section in view.sections for chart in section.charts if isinstance(chart, ParallelChart)]
    assert len(parallel.params) == 10


def test_the_view_of_all_sweeps_has_trials_alone() -> None:
    state = SWEEPS.to_state()
    # By MLflow's other name of the time, which folds none.
    assert (state["orderByKey"], state["orderByAsc"]) == ("attributes.`Created`", False)
    assert state["searchFilter"] == "tags.role = 'sweep' AND tags.configuration LIKE '%'"
