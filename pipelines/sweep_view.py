"""The saved views of sweeps: one for each, which its link opens, and one for all of an experiment.

What they show is what a trial records at its end, at step 0 and finite: a run that diverged is on every chart, while a
last value that is not finite would drop it from half of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.flatten import Scalar
from pipelines.saved_view import BarChart, Chart, ContourChart, LineChart, ParallelChart, ScatterChart, Section, View

KEY_PREFIX = "sweep-"
"""The key of a sweep's view begins so."""
OBJECTIVE = "sweep/objective"
FIGURES = (
    OBJECTIVE,
    "sweep/val_loss",
    "sweep/max_vio_global",
    "sweep/spikes_left",
    "sweep/steps_lost",
    "sweep/diverged",
    "sweep/steps",
)
"""What a trial records at its end, the most important first."""
LOAD_BY_LAYER = tuple(LineChart(f"moe_max_vio/layer_{layer:02}") for layer in range(8))
"""MaxVio of each layer with experts, where runs record it (``tracking.per_layer``): the UI hides a chart without data,
and has those of further layers below."""

_LOSS = "metrics.sweep/val_loss"
# More are too many to look at, and the report has them all.
_MOST_SCATTERS = 6
_MOST_CONTOURS = 4
# Names of trials say what is different about them.
_NAME_WIDTH = 340
# The UI has no room for the names of more axes side by side.
_MOST_AXES = 10
# Beyond so many different texts it would leave out the runs with the others.
_MOST_TEXTS = 30


@dataclass(frozen=True)
class SweptKey:
    """A key of the config that differs between the configurations of a sweep."""

    name: str
    kind: Literal["number", "text", "mixed"]
    """Of its value; mixed if it is now one and now the other, or some configurations have none."""


def swept_keys(configurations: Iterable[Mapping[str, Scalar]]) -> tuple[SweptKey, ...]:
    """What differs between the configurations of a sweep, each a config by its dotted keys (`flatten`).

    Ends and all choices of a search space are enough to tell the kinds.
    """
    flat = list(configurations)
    names = dict.fromkeys(name for configuration in flat for name in configuration)
    swept = []
    for name in names:
        values = [configuration.get(name) for configuration in flat]
        if len(set(values)) > 1:
            swept.append(SweptKey(name, _kind(values)))
    return tuple(swept)


def _kind(values: list[Scalar]) -> Literal["number", "text", "mixed"]:
    if all(isinstance(value, str | bool) for value in values):
        return "text" if len(set(values)) <= _MOST_TEXTS else "mixed"
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return "number" if is_number else "mixed"


def sweep_view(parent_id: str, name: str, keys: Sequence[SweptKey]) -> View:
    """The view of one sweep: its trials, the best first, whatever other runs there are.

    ``parent_id`` is MLflow's id of the sweep's run.
    """
    return View(
        key=KEY_PREFIX + parent_id,
        name=f"Sweep {name}",
        sections=_sections(keys),
        columns=(
            f"metrics.{OBJECTIVE}",
            "tags.outcome",
            *(f"params.{key.name}" for key in keys),
            "params.seed",
            *(f"metrics.{figure}" for figure in FIGURES if figure != OBJECTIVE),
            "attributes.Models",
        ),
        search=f"tags.`mlflow.parentRunId` = '{parent_id}'",
        # By a metric, since by time the UI would fold them.
        order_by=f"metrics.{OBJECTIVE}",
        ascending=True,
        name_width=_NAME_WIDTH,
        all_runs=True,
    )


def _sections(keys: Sequence[SweptKey]) -> tuple[Section, ...]:
    numbers = [f"params.{key.name}" for key in keys if key.kind == "number"]
    axes = tuple(key.name for key in keys if key.kind != "mixed")[:_MOST_AXES]
    pairs = [(x, y) for i, x in enumerate(numbers) for y in numbers[i + 1 :]]
    by_key: tuple[Chart, ...] = (
        *(ScatterChart(x, _LOSS) for x in numbers[:_MOST_SCATTERS]),
        *(ContourChart(x, y, _LOSS) for x, y in pairs[:_MOST_CONTOURS]),
    )
    contents: tuple[tuple[str, tuple[Chart, ...], int, int], ...] = (
        ("Loss and its spikes", (LineChart("train/loss", "log", marks="spike/loss_at_spike"),), 1, 460),
        (
            "All keys at once",
            (ParallelChart(axes, ("sweep/max_vio_global", "sweep/diverged", "sweep/val_loss")),),
            1,
            460,
        ),
        ("Key by key", by_key, 2, 360),
        (
            "On the way",
            (
                LineChart("val/loss", "log"),
                LineChart("train/loss_max", "log"),
                LineChart("train/grad_norm", "log"),
                LineChart("spike/count"),
            ),
            2,
            300,
        ),
        (
            "Load balance",
            (
                LineChart("moe/max_vio_batch"),
                LineChart("moe/max_vio_global"),
                *LOAD_BY_LAYER,
            ),
            2,
            300,
        ),
        ("Final figures", tuple(map(BarChart, FIGURES)), 2, 360),
    )
    present = [content for content in contents if content[1]]
    return tuple(
        Section(f"{number} {title}", charts, charts_per_row, height)
        for number, (title, charts, charts_per_row, height) in enumerate(present, 1)
    )


_COMMON = (SweptKey("optimizer.lr", "number"), SweptKey("schedule.warmup_steps", "number"))

SWEEPS = View(
    key="sweep",
    name="Sweep",
    sections=_sections(_COMMON),
    columns=(
        "tags.sweep",
        "tags.outcome",
        *(f"metrics.{figure}" for figure in FIGURES),
        *(f"params.{key.name}" for key in _COMMON),
        "params.stability.balance.bias_update_rate",
        "params.stability.clip.kind",
        "params.seed",
        "attributes.Models",
    ),
    # A parent has nothing to show on a chart.
    search="tags.role = 'sweep' AND tags.configuration LIKE '%'",
    name_width=_NAME_WIDTH,
    all_runs=True,
)
"""For all sweeps of an experiment: their trials, the newest first."""
