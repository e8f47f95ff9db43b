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

# Charts that are compared look at the newest so many runs; also what the UI shows of a list without a view.
_RUNS = 10
# Three, as the UI would take, are too narrow for their titles on a laptop where its assistant is open, as at first.
_CHARTS_PER_ROW = 2
_CHART_HEIGHT = 300
_NAMESPACE = uuid.UUID("6d3f3c1e-53b1-4a1a-9b57-0a4f6f1f7a10")


@dataclass(frozen=True)
class LineChart:
    """One metric over the optimizer steps, a line a run."""

    metric: str
    scale: Literal["linear", "log"] = "linear"

    def to_state(self) -> dict[str, Any]:
        """The UI's fields of this kind of chart."""
        return {
            "type": "LINE",
            "metricKey": self.metric,
            "selectedMetricKeys": [self.metric],
            "displayName": self.metric,
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

    def to_state(self) -> dict[str, Any]:
        """The UI's fields of this kind of chart."""
        return {"type": "BAR", "metricKey": self.metric, "displayName": self.metric}


Chart = LineChart | BarChart


@dataclass(frozen=True)
class Section:
    """A titled part of the chart page. Metrics that are on no chart get sections of their own, below."""

    title: str
    charts: tuple[Chart, ...]


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
                    "columns": _CHARTS_PER_ROW,
                    "cardHeight": _CHART_HEIGHT,
                }
            )
            for chart in section.charts:
                common = {
                    "uuid": _id(self.key, section.title, chart.metric),
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
            "columnOrder": ["duration", *columns],
            "columnWidths": {_quoted(column): _width(column) for column in self.columns},
            "compareRunSections": sections,
            "compareRunCharts": charts,
            # Otherwise the UI sorts the sections by name, and puts its own between them.
            "isAccordionReordered": True,
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


def _compact(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))


def _id(*names: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, "/".join(names)))


def _width(column: str) -> int:
    """Wide enough for the whole name in the table's head; the UI would cut it at about 14 characters."""
    return max(90, 24 + 8 * len(column.partition(".")[2]))


def _quoted(column: str) -> str:
    """``metrics.final/loss`` as the UI writes it: with backticks."""
    kind, _, name = column.partition(".")
    return f"{kind}.`{name}`"
