"""What a person sees who opens the links that a run prints: real runs, a real MLflow server, a real browser."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.home import HOME_VARIABLE
from pipelines.run_folder import RunFolder
from pipelines.saved_view import LineChart
from pipelines.summary import print_summary
from pipelines.tracking import Tracker
from pipelines.tracking_store import open_store
from pipelines.views import TRAINING
from tests.pipelines.browser import NEEDS_A_BROWSER, Page
from tests.pipelines.mlflow_charts import CHART, TITLES
from tests.pipelines.mlflow_server import Server
from tests.pipelines.small_run import metrics_of, run_loop, small_config
from tests.pipelines.tracked import DATASET

pytestmark = [pytest.mark.slow, NEEDS_A_BROWSER]

STEPS = 40


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
