"""What a person sees who opens the links that a run prints: real runs, a real MLflow server, a real browser."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from rich.console import Console

from pipelines.home import HOME_VARIABLE
from pipelines.run_folder import RunFolder
from pipelines.saved_view import LineChart
from pipelines.summary import print_summary
from pipelines.tracking import Tracker
from pipelines.tracking_store import open_store
from pipelines.views import REPLAYS, TRAINING
from tests.pipelines.browser import NEEDS_A_BROWSER, Page
from tests.pipelines.driver import run_steadymoe
from tests.pipelines.mlflow_charts import CHART, TITLES
from tests.pipelines.mlflow_server import Server
from tests.pipelines.small_run import metrics_of, run_loop, small_config
from tests.pipelines.tracked import DATASET

pytestmark = [pytest.mark.slow, NEEDS_A_BROWSER]

STEPS = 40
# Whether the page has a chart with this title, scrolling on until it has.
IS_THERE = """
const titles = [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"] h4')];
if (titles.some(title => title.title === arguments[0])) return true;
document.querySelector('[data-testid="experiment-view-compare-runs-chart-area"]')?.scrollBy(0, 300);
return false;
"""


@dataclass(frozen=True)
class Runs:
    """What has been trained, and the links that the last of them printed."""

    folders: dict[str, RunFolder]
    this_run: str
    all_runs: str
    server: Server


def _train(
    server: Server,
    name: str,
    *settings: str,
    resume: RunFolder | None = None,
    parent: RunFolder | None = None,
    fails: bool = False,
) -> RunFolder:
    """A run as the driver makes it, but for Ray: its training loop runs in this process."""
    chosen = (f"schedule.steps={STEPS}", "checkpoint.every_steps=20", f"tracking.run_name={name}", *settings)
    config = small_config(*chosen, f"tracking.uri={server.uri}")
    tags = {"mlflow.parentRunId": parent.info.id} if parent else {}
    try:
        with Tracker.start(config, open_store(server.uri), dataset=DATASET, resume=resume, tags=tags) as tracker:
            run_loop(0, 1, tracker.folder.path, chosen)
            if fails:
                raise RuntimeError("a worker was lost")
    except RuntimeError:
        assert fails
    assert tracker.undelivered is None
    return tracker.folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    home = tmp_path_factory.mktemp("home")
    server = Server(home / "mlflow.db", home / "server.log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(home))
        try:
            server.start()
            folders = {"failed": _train(server, "failed", fails=True)}
            # The UI would fold it under its parent.
            folders["dense"] = _train(server, "dense", "model.moe.num_experts=0", parent=folders["failed"])
            folders["resumed"] = _train(server, "resumed", "schedule.steps=15")
            folders["finished"] = _train(server, "finished", "seed=1")
            _train(server, "resumed", resume=folders["resumed"])
            output = io.StringIO()
            print_summary(folders["finished"], 1.0, Console(file=output, width=80))
            links = dict(re.findall(r"^(this run|all runs) +(http\S+)$", output.getvalue(), re.MULTILINE))
            yield Runs(folders, links["this run"], links["all runs"], server)
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
    return browser


def _recorded(folder: RunFolder, kind: str, metric: str) -> tuple[list[int], list[float]]:
    points = {step: metrics[metric] for step, metrics in metrics_of(folder.path, kind).items() if metric in metrics}
    return list(points), list(points.values())


@pytest.mark.parametrize(
    ("metric", "kind", "names"),
    [
        ("train/loss", "train", {"failed", "dense", "resumed", "finished"}),
        ("val/loss", "validation", {"failed", "dense", "resumed", "finished"}),
        ("moe/max_vio_batch", "train", {"failed", "resumed", "finished"}),
    ],
)
def test_the_charts_show_every_run_as_it_was(runs: Runs, page: Page, metric: str, kind: str, names: set[str]) -> None:
    page.open(runs.all_runs)
    lines = page.wait(CHART, metric, len(names))
    drawn = {re.sub(r" \(.*\)$", "", name): (x, y) for name, x, y in lines}
    assert drawn.keys() == names
    for name in names:
        steps, values = _recorded(runs.folders[name], kind, metric)
        assert drawn[name][0] == steps
        assert drawn[name][1] == pytest.approx(values)


def test_the_view_opens_with_its_sections_and_charts_in_order(runs: Runs, page: Page) -> None:
    page.open(runs.all_runs)
    sections = [section.title for section in TRAINING.sections]
    text = page.wait_for_text("5 Final figures", *sections, *runs.folders)
    places = [text.index(title) for title in sections]
    assert places == sorted(places)
    first = [chart.title for section in TRAINING.sections[:2] for chart in section.charts]
    assert page.wait(TITLES, 4)[:4] == first[:4]
    assert all(isinstance(chart, LineChart) for chart in TRAINING.sections[0].charts)
    assert "error" not in page.wait_for_text("5 Final figures").lower()


def test_the_description_leads_to_the_other_view(runs: Runs, page: Page) -> None:
    page.open(runs.all_runs.partition("?")[0] + "?workflowType=machine_learning")
    page.click("Routing")
    page.wait_for_text("1 Load balance")
    # The dense run has no such metric.
    page.wait(CHART, "moe/max_vio_batch", len(runs.folders) - 1)


def test_a_checkpoint_is_found_and_says_where_it_lies(runs: Runs, page: Page) -> None:
    page.open(runs.all_runs.partition("/runs?")[0] + "/models?workflowType=machine_learning")
    page.wait_for_text("finished-step00000040", "finished-step00000020", "resumed-step00000040", "failed-step00000040")
    page.click("finished-step00000040")
    page.wait_for_text(str(runs.folders["finished"].checkpoints / "step-00000040"), "val/loss")


def test_the_link_to_this_run_opens_its_page(runs: Runs, page: Page) -> None:
    page.open(runs.this_run)
    page.wait_for_text("Trained a 2-layer MoE", "finished", "Finished")


def test_the_view_of_replays_shows_each_treatment(runs: Runs, page: Page) -> None:
    """A spike that a weight has made, and the replay of it by the command."""
    fault = "faults=[{kind: weight_scaled, step: 50, parameters: head.weight, factor: 20.0}]"
    spiky = _train(runs.server, "spiky", "schedule.steps=60", fault, "tracking.experiment=spikes")
    home = spiky.path.parents[1]
    done = run_steadymoe(home, "replay", "spiky", "loss-000050", "--with", "half-lr", "--after", "4")
    assert "reproduced: " in done.stdout
    (link,) = re.findall(r"^all runs +(http\S+)$", done.stdout, re.MULTILINE)
    page.open(link)
    page.wait_for_text(*(section.title for section in REPLAYS.sections), "as-it-was", "half-lr")
    lines = page.wait(CHART, "train/loss", 2)
    drawn = {re.sub(r" \(.*\)$", "", name): dict(zip(x, y, strict=True)) for name, x, y in lines}
    assert drawn.keys() == {"as-it-was-loss-000050", "half-lr-loss-000050"}
    recorded = dict(zip(*_recorded(spiky, "train", "train/loss"), strict=True))
    for points in drawn.values():
        assert list(points) == list(range(41, 55))
    for step in range(41, 50):  # what the fault did to the next was taken back in the run
        assert drawn["as-it-was-loss-000050"][step] == pytest.approx(recorded[step])
    for section in REPLAYS.sections:
        for chart in section.charts:
            page.wait(IS_THERE, chart.title)
