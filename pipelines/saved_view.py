"""Saved views of the MLflow UI as code: what is on one, and the JSON that the UI reads it from.

A saved view is a tag of an experiment. Its format is the UI's own and documented nowhere; this is that of MLflow 3.17,
where everything left out takes the UI's default.
"""

import base64
import json
import uuid
import zlib
from dataclasses import dataclass
from typing import Any, Literal

TAG_PREFIX = "mlflow.sharedViewState."

# The UI keeps a number with every chart, and draws all runs that are shown all the same.
_RUNS = 10
_NAME_COLUMN = "attributes.`Run Name`"
_NAMESPACE = uuid.UUID("6d3f3c1e-53b1-4a1a-9b57-0a4f6f1f7a10")


@dataclass(frozen=True)
class LineChart:
    """One metric over the optimizer steps, a line a run."""

    metric: str
    scale: Literal["linear", "log"] = "linear"
    marks: str | None = None
    """Another metric on the same axes: points at few steps, joined by dashes in the run's colour."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """All that it shows."""
        return (self.metric,) if self.marks is None else (self.metric, self.marks)

    @property
    def title(self) -> str:
        """What the UI writes above it."""
        return " vs ".join(self.metrics)

    def to_state(self) -> dict[str, Any]:
        """The UI's fields of this kind of chart."""
        return {
            "type": "LINE",
            "metricKey": self.metric,
            "selectedMetricKeys": list(self.metrics),
            "displayName": self.title,
            "scaleType": self.scale,
            "xAxisKey": "step",
            "xAxisScaleType": "linear",
            "yAxisKey": "metric",
            "yAxisExpressions": [],
            "lineSmoothness": 0,
            "useGlobalXaxisKey": True,
            "useGlobalLineSmoothing": True,
            "ignoreOutliers": False,
            "range": {},
        }


@dataclass(frozen=True)
class BarChart:
    """The last value of one metric, a bar a run."""

    metric: str

    @property
    def metrics(self) -> tuple[str, ...]:
        """All that it shows."""
        return (self.metric,)

    @property
    def title(self) -> str:
        """What the UI writes above it."""
        return self.metric

    def to_state(self) -> dict[str, Any]:
        """The UI's fields of this kind of chart."""
        return {"type": "BAR", "metricKey": self.metric, "displayName": self.metric}


@dataclass(frozen=True)
class ParallelChart:
    """A line a run through an axis for each parameter and metric, coloured by the last metric.

    The UI leaves out a run that lacks one of them, or whose last value of one is not finite; and where most runs have
    a number, those with a text: parameters of such a kind have no place here.
    """

    params: tuple[str, ...]
    metrics: tuple[str, ...]

    @property
    def title(self) -> str:
        """What the UI writes above it."""
        return "Parallel Coordinates"

    def to_state(self) -> dict[str, Any]:
        """The UI's fields of this kind of chart."""
        return {
            "type": "PARALLEL",
            "selectedParams": list(self.params),
            "selectedMetrics": list(self.metrics),
            "showAllRuns": True,
        }


@dataclass(frozen=True)
class ScatterChart:
    """A dot a run. Axes are named as columns of the table: ``params.optimizer.lr``, ``metrics.final/loss``."""

    x: str
    y: str

    @property
    def metrics(self) -> tuple[str, ...]:
        """All that it shows."""
        return _metrics_of(self.x, self.y)

    @property
    def title(self) -> str:
        """What the UI writes above it."""
        return f"{_name(self.x)} vs. {_name(self.y)}"

    def to_state(self) -> dict[str, Any]:
        """The UI's fields of this kind of chart."""
        return {"type": "SCATTER", "xaxis": _axis(self.x), "yaxis": _axis(self.y)}


@dataclass(frozen=True)
class ContourChart:
    """The colour is a third axis, between the dots of the runs; axes are named as in `ScatterChart`."""

    x: str
    y: str
    z: str

    @property
    def metrics(self) -> tuple[str, ...]:
        """All that it shows."""
        return _metrics_of(self.x, self.y, self.z)

    @property
    def title(self) -> str:
        """What the UI writes above it."""
        return f"{_name(self.x)} vs. {_name(self.y)} vs. {_name(self.z)}"

    def to_state(self) -> dict[str, Any]:
        """The UI's fields of this kind of chart."""
        return {"type": "CONTOUR", "xaxis": _axis(self.x), "yaxis": _axis(self.y), "zaxis": _axis(self.z)}


Chart = LineChart | BarChart | ParallelChart | ScatterChart | ContourChart


@dataclass(frozen=True)
class Section:
    """A titled part of the chart page. Metrics that are on no chart get sections of their own, below."""

    title: str
    charts: tuple[Chart, ...]
    # Three, as the UI would take, are too narrow for their titles on a laptop where its assistant is open, as at first.
    charts_per_row: int = 2
    height: int = 300
    """Of a chart, in pixels."""


@dataclass(frozen=True)
class View:
    """One entry of the UI's menu of views: the charts, and the table of runs."""

    key: str
    """Names it in links; must stay as it is."""
    name: str
    """Names it in the menu."""
    sections: tuple[Section, ...]
    columns: tuple[str, ...]
    """Of the table, in order: ``metrics.final/loss``, ``params.seed``, ``tags.role``, ``attributes.Models``. Name,
    status with age, and duration always stand before them."""
    search: str = ""
    """Which runs, in the language of the UI's search box."""
    order_by: str = "attributes.Created"
    """Column to sort by. With the UI's own name of the time (``attributes.start_time``), children would be folded under
    their parents, and a folded run is on no chart; MLflow's other name of it gives a flat list."""
    ascending: bool = False
    group_tag: str | None = None
    """Charts show the mean of the runs that have the same in this tag, and the list has them under one heading."""
    name_width: int = 190
    """Of the column with the names of runs, in pixels."""
    all_runs: bool = False
    """Whether the charts show all runs of the table, rather than the first ten."""

    @property
    def tag(self) -> str:
        """Name of the experiment's tag."""
        return TAG_PREFIX + self.key

    def link(self, experiment_id: str) -> str:
        """The part of a link that follows the server's address. Without ``/runs`` the UI would drop the view's key, and
        without the workflow type it would open its page on generative AI."""
        return (
            f"/#/experiments/{experiment_id}/runs"
            f"?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={self.key}"
        )

    def to_state(self) -> dict[str, Any]:
        """The state of the page as the UI keeps it."""
        columns = [_quoted(column) for column in self.columns]
        sections, charts = [], []
        for section in self.sections:
            # Any unique id will do; the same in every process, so that an unchanged view is not written again.
            id_ = _id(self.key, section.title)
            sections.append(
                {
                    "uuid": id_,
                    "name": section.title,
                    "display": True,
                    "isReordered": True,
                    "deleted": False,
                    "isGenerated": False,
                    "columns": section.charts_per_row,
                    "cardHeight": section.height,
                }
            )
            for chart in section.charts:
                common = {
                    "uuid": _id(self.key, section.title, chart.title),
                    "metricSectionId": id_,
                    "runsCountToCompare": _RUNS,
                    "deleted": False,
                    "isGenerated": False,
                }
                charts.append(common | chart.to_state())
        state = {
            "searchFilter": self.search,
            "orderByKey": _quoted(self.order_by),
            "orderByAsc": self.ascending,
            "selectedColumns": columns,
            "columnOrder": [_NAME_COLUMN, "duration", *columns],
            "columnWidths": {_NAME_COLUMN: self.name_width}
            | {_quoted(column): _width(column) for column in self.columns},
            "compareRunSections": sections,
            "compareRunCharts": charts,
            # Otherwise the UI sorts the sections by name, and puts its own between them.
            "isAccordionReordered": True,
            "runsHiddenMode": "SHOW_ALL" if self.all_runs else "FIRST_10_RUNS",
        }
        if self.group_tag is not None:
            key = {"mode": "tag", "groupByData": self.group_tag}
            state |= {
                "groupBy": {"aggregateFunction": "average", "groupByKeys": [key]},
                "useGroupedValuesInCharts": True,
            }
        return state

    def to_tag(self, created_ms: int, updated_ms: int) -> str:
        """The tag's value."""
        packed = zlib.compress(_compact(self.to_state()).encode(), 9)
        state = "deflate;" + base64.b64encode(packed).decode()
        return _compact({"name": self.name, "createdAt": created_ms, "updatedAt": updated_ms, "state": state})


def read_state(tag: str) -> dict[str, Any]:
    """The state in a tag's value, whoever wrote it.

    Raises:
        ValueError: it is not understood.
    """
    try:
        state = json.loads(tag)["state"]
        if state.startswith("deflate;"):
            state = zlib.decompress(base64.b64decode(state.removeprefix("deflate;"))).decode()
        content: dict[str, Any] = json.loads(state)
    except (TypeError, AttributeError, KeyError, zlib.error) as error:
        raise ValueError(f"not a saved view: {error}") from error
    return content


def _name(column: str) -> str:
    return column.partition(".")[2]


def _metrics_of(*columns: str) -> tuple[str, ...]:
    return tuple(_name(column) for column in columns if column.startswith("metrics."))


def _axis(column: str) -> dict[str, str]:
    return {"key": _name(column), "type": "METRIC" if column.startswith("metrics.") else "PARAM"}


def _compact(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))


def _id(*names: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, "/".join(names)))


def _width(column: str) -> int:
    """Wide enough for the whole name in the table's head; the UI would cut it at about 14 characters."""
    return max(90, 24 + 8 * len(_name(column)))


def _quoted(column: str) -> str:
    """``metrics.final/loss`` as the UI writes it: with backticks."""
    kind, _, name = column.partition(".")
    return f"{kind}.`{name}`"
