"""What a person sees who opens the links that a run prints: real runs, a real MLflow server, a real browser."""

import io
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from pipelines.home import HOME_VARIABLE
from pipelines.run_folder import RunFolder
from pipelines.saved_view import LineChart
from pipelines.summary import print_summary
from pipelines.tracking import Tracker
from pipelines.tracking_store import open_store
from pipelines.views import TRAINING
from tests.pipelines.mlflow_server import Server
from tests.pipelines.small_run import metrics_of, run_loop, small_config
from tests.pipelines.tracked import DATASET

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BROWSER and DRIVER), reason="no browser: the programs chromium and chromedriver are not on this machine"
    ),
]

STEPS = 40
# A page takes 3 to 10 s on two idle cores.
PATIENCE_S = 120

# The chart with this title as plotly has it: names, x and y of its lines, and how wide what it drew of them is.
# The page scrolls on until it is there.
CHART = """
const cards = [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"]')];
const card = cards.find(card => card.querySelector('h4')?.title === arguments[0]);
if (!card) {
  // A chart is made when its place comes into sight.
  document.querySelector('[data-testid="experiment-view-compare-runs-chart-area"]')?.scrollBy(0, 300);
  return null;
}
card.scrollIntoView({block: 'center'});
const plot = card.querySelector('.js-plotly-plot');
const lines = [...card.querySelectorAll('.scatterlayer path.js-line')];
if (!plot?.data || !lines.length) return null;
return {
  lines: plot.data.filter(line => line.x?.length).map(line => [line.name, Array.from(line.x), Array.from(line.y)]),
  width: Math.max(...lines.map(line => line.getBoundingClientRect().width)),
};
"""
# Titles of the charts that the page has by now: those further down appear as one scrolls.
TITLES = """
return [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"] h4')].map(title => title.title)
"""


class Page:
    """A browser with a fresh profile. It waits for content: the pages of this UI never become idle."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(BROWSER)
        options.add_argument("--headless=new")
        options.add_argument("--window-size=1400,1000")
        options.add_argument(f"--user-data-dir={profile}")
        # In a container /dev/shm may be tiny, and there may be no other user than root, as whom it refuses its sandbox.
        options.add_argument("--disable-dev-shm-usage")
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")
        self.browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))

    def open(self, link: str) -> None:
        self.browser.get(link)

    def wait(self, script: str, *arguments: Any) -> Any:
        """What a script returns, as soon as that is something."""
        failing = WebDriverWait(self.browser, PATIENCE_S)
        return failing.until(lambda browser: browser.execute_script(script, *arguments), f"in vain: {script}")

    def wait_for_text(self, text: str) -> str:
        """The page's text once this is in it."""
        whole: str = self.wait("const t = document.body.innerText; return t.includes(arguments[0]) && t", text)
        return whole

    def click(self, text: str) -> None:
        """Follow the link of this text, into a new tab if it opens one."""
        self.wait_for_text(text)
        self.browser.find_element(By.LINK_TEXT, text).click()
        self.browser.switch_to.window(self.browser.window_handles[-1])


@dataclass(frozen=True)
class Runs:
    """What has been trained, and the links that the last of them printed."""

    folders: dict[str, RunFolder]
    this_run: str
    all_runs: str


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
            yield Runs(folders, links["this run"], links["all runs"])
        finally:
            server.kill()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    page = Page(tmp_path / "profile")
    yield page
    page.browser.quit()


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
    chart = page.wait(CHART, metric)
    assert chart["width"] > 100
    drawn = {re.sub(r" \(.*\)$", "", name): (x, y) for name, x, y in chart["lines"]}
    assert drawn.keys() == names
    for name in names:
        steps, values = _recorded(runs.folders[name], kind, metric)
        assert drawn[name][0] == steps
        assert drawn[name][1] == pytest.approx(values)


def test_the_view_opens_with_its_sections_and_charts_in_order(runs: Runs, page: Page) -> None:
    page.open(runs.all_runs)
    text = page.wait_for_text("5 Final figures")
    places = [text.index(section.title) for section in TRAINING.sections]
    assert places == sorted(places)
    first = [chart.metric for section in TRAINING.sections[:2] for chart in section.charts]
    assert page.wait(TITLES)[:4] == first[:4]
    assert all(isinstance(chart, LineChart) for chart in TRAINING.sections[0].charts)
    assert "error" not in text.lower()
    for name in runs.folders:
        assert name in text


def test_the_description_leads_to_the_other_view(runs: Runs, page: Page) -> None:
    page.open(runs.all_runs.partition("?")[0] + "?workflowType=machine_learning")
    page.click("Routing")
    page.wait_for_text("1 Load balance")
    assert page.wait(CHART, "moe/max_vio_batch")["width"] > 100


def test_a_checkpoint_is_found_and_says_where_it_lies(runs: Runs, page: Page) -> None:
    page.open(runs.all_runs.partition("/runs?")[0] + "/models?workflowType=machine_learning")
    text = page.wait_for_text("finished-step00000040")
    assert {"finished-step00000020", "resumed-step00000040", "failed-step00000040"} <= set(text.split())
    page.click("finished-step00000040")
    text = page.wait_for_text(str(runs.folders["finished"].checkpoints / "step-00000040"))
    assert "val/loss" in text


def test_the_link_to_this_run_opens_its_page(runs: Runs, page: Page) -> None:
    page.open(runs.this_run)
    text = page.wait_for_text("Trained a 2-layer MoE")
    assert "finished" in text
    assert "Finished" in text
