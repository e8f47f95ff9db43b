"""What a person sees who opens the link of a sweep: a real MLflow server, a real browser, trials made by hand."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pipelines.home import HOME_VARIABLE
from pipelines.saved_view import View
from pipelines.sweep_view import FIGURES, SWEEPS, sweep_view, swept_keys
from pipelines.tracking_store import open_store, view_link
from pipelines.view_publishing import publish_sweep_view, publish_views
from tests.pipelines.browser import NEEDS_A_BROWSER, Page
from tests.pipelines.made_sweep import (
    DIVERGED,
    MOE_LAYERS,
    NAN,
    STEPS,
    configurations,
    figures_of,
    last_step,
    loss_at,
    make_sweep,
    spike_steps,
)
from tests.pipelines.mlflow_charts import AXES, CHART, PARTS, TITLES
from tests.pipelines.mlflow_server import Server

pytestmark = [pytest.mark.slow, NEEDS_A_BROWSER]

LABELS = [label for label, _ in configurations()]
FINAL = {label: figures_of(label, params) for label, params in configurations()}
LOSS = "train/loss vs spike/loss_at_spike"


@dataclass(frozen=True)
class Sweep:
    """A sweep, and the links to its view and to that of all sweeps."""

    view: View
    link: str
    all_sweeps: str


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    home = tmp_path_factory.mktemp("home")
    server = Server(home / "mlflow.db", home / "server.log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(home))
        try:
            server.start()
            client = open_store(server.uri).client
            experiment = client.create_experiment("sweeps")
            client.create_run(experiment, tags={"mlflow.runName": "no-trial", "role": "train"})
            parent = make_sweep(client, experiment)
            view = sweep_view(parent, "stability", swept_keys(params for _, params in configurations()))
            publish_views(client, experiment)
            publish_sweep_view(client, experiment, view)
            yield Sweep(view, view_link(server.uri, experiment, view), view_link(server.uri, experiment, SWEEPS))
        finally:
            server.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.browser.quit()


@pytest.fixture
def page(browser: Page) -> Page:
    """A browser as it is before its first page."""
    browser.forget()
    # Charts are made as they come into sight: here all of the view's are.
    browser.browser.set_window_size(1400, 5600)
    return browser


def test_one_link_opens_the_ready_comparison(sweep: Sweep, page: Page) -> None:
    page.open(sweep.link)
    page.click_away_the_assistant()
    text = page.wait_for_text(*(section.title for section in sweep.view.sections), *LABELS, "12 matching runs")
    places = [text.index(section.title) for section in sweep.view.sections]
    assert places == sorted(places)
    assert "no-trial" not in text
    # The best first, and the 300 figures of one trial below the view's own.
    best = min(LABELS, key=lambda label: FINAL[label]["sweep/objective"])
    assert min(LABELS, key=text.index) == best
    drawn = [
        LOSS,
        "Parallel Coordinates",
        "optimizer.lr vs. sweep/val_loss",
        "schedule.warmup_steps vs. sweep/val_loss",
    ]
    assert page.wait(TITLES, 4)[:4] == drawn
    assert text.index("health/layer_00") > places[-1]

    lines = page.wait(CHART, LOSS, len(LABELS))
    for label, params in configurations():
        # NaN is a gap.
        curves: list[dict[int, float]] = [
            {step: value for step, value in zip(x, y, strict=True) if value is not None}
            for name, x, y in lines
            if name == f"{label} 0"
        ]
        losses, marks = max(curves, key=len), min(curves, key=len)
        steps = [step for step in range(1, last_step(label) + 1) if not (label == NAN and step == STEPS)]
        assert list(losses) == steps
        assert list(losses.values()) == pytest.approx([loss_at(s, label, params["optimizer.lr"]) for s in steps])
        assert tuple(marks) == (spike_steps(label) or tuple(steps))

    axes = dict(page.wait(AXES, "Parallel Coordinates"))
    assert set(axes["stability.clip.kind"]) == {"global", "none"}
    # Only the trial that diverged has either.
    assert "1.0" in axes["sweep/diverged"]
    assert max(map(float, axes["sweep/val_loss"])) > max(
        FINAL[label]["sweep/val_loss"] for label in set(LABELS) - {DIVERGED}
    )

    (scatter,) = page.wait(PARTS, "optimizer.lr vs. sweep/val_loss", ".points path", len(LABELS))
    assert sorted(map(float, scatter["x"])) == sorted(params["optimizer.lr"] for _, params in configurations())
    assert sorted(scatter["y"]) == sorted(figures["sweep/val_loss"] for figures in FINAL.values())
    title = "optimizer.lr vs. schedule.warmup_steps vs. sweep/val_loss"
    contour, _ = page.wait(PARTS, title, ".contourlayer path, .heatmaplayer image", 1)
    assert contour["type"] == "contour"
    assert len(contour["z"]) == len(LABELS)
    assert all(map(math.isfinite, contour["z"]))

    for layer in range(MOE_LAYERS):
        page.wait(CHART, f"moe_max_vio/layer_{layer:02}", len(LABELS))
    for figure in FIGURES:
        (bars,) = page.wait(PARTS, figure, ".barlayer .point", len(LABELS))
        assert sorted(bars["x"]) == sorted(figures[figure] for figures in FINAL.values())
    page.keep_screenshot("sweep")


def test_the_table_of_trials_has_what_was_swept_and_what_came_of_it(sweep: Sweep, page: Page) -> None:
    page.browser.set_window_size(2600, 900)
    page.open(sweep.link.replace("&compareRunsMode=CHART", ""))
    page.click_away_the_assistant()
    columns = [column.partition(".")[2] for column in sweep.view.columns if not column.startswith("attributes.")]
    # Names of trials are there in full.
    page.wait_for_text(*LABELS, *columns, "diverged", "15.55")
    page.keep_screenshot("sweep-table", width=2600)


def test_the_view_of_all_sweeps_has_their_trials_and_nothing_else(sweep: Sweep, page: Page) -> None:
    page.open(sweep.all_sweeps)
    text = page.wait_for_text("12 matching runs", *(section.title for section in SWEEPS.sections))
    assert "no-trial" not in text
    page.wait(CHART, LOSS, len(LABELS))
    page.keep_screenshot("sweeps")
