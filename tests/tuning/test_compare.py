"""`steadymoe compare` as a user meets it, and its page in a real browser: from the disk, and in the MLflow UI."""

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra.cli import main
from pipelines.home import HOME_VARIABLE
from pipelines.run_folder import RunFolder, comparison_folders, write_json
from pipelines.tracking_store import URI_VARIABLE
from tests.pipelines.browser import NEEDS_A_BROWSER, Page
from tests.pipelines.mlflow_server import Server
from tests.tuning.comparison.made import Made, folders

pytestmark = pytest.mark.slow

# Of each plot of the page: whether it is drawn, and how much of it.
PLOTS = """
const plots = [...document.querySelectorAll('.plotly-graph-div')];
const parts = '.main-svg .trace, .main-svg .hm, .main-svg .bars .point';
const drawn = plots.map(plot => plot.querySelectorAll(parts).length);
return document.readyState === 'complete' && plots.length && drawn.every(number => number > 0) && drawn;
"""
INNER = "return document.querySelector('iframe') !== null;"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    return tmp_path


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    page = Page(tmp_path / "profile")
    yield page
    page.browser.quit()


def make_runs() -> list[str]:
    """A grid with seeds: the highest rate diverges without a clip, the lowest bias rate leaves the load uneven; one of
    them with 300 further metrics."""
    names: list[str] = []
    grid = product(enumerate(("1e-3", "3e-3", "1e-2", "3e-2")), ("none", "zclip"), ("1e-4", "1e-2"), range(3))
    for (place, rate), clip, bias_rate, seed in grid:
        lost = rate == "3e-2" and clip == "none"
        settings = (
            f"optimizer.lr={rate}",
            f"stability.clip.kind={clip}",
            f"stability.balance.bias_update_rate={bias_rate}",
            "tracking.per_layer=true",
        )
        made = Made(
            f"lr{rate}-{clip}-b{bias_rate}-s{seed}",
            settings,
            seed,
            loss=3.0 + 0.15 * (place - 2) ** 2 + 0.03 * seed + (0.05 if clip == "none" else 0.0) + _chance(place, seed),
            max_vio=(1.4 if bias_rate == "1e-4" else 0.5) + 0.05 * seed,
            lost_at=9 + seed if lost else None,
            spikes=(5,) if lost else (12,) if clip == "none" and place == 2 else (),
            layers=3,
            further=300 if not names else 0,
        )
        made.write()
        names.append(made.name)
    return names


def _chance(place: int, seed: int) -> float:
    return 0.004 * ((5 * place + 3 * seed) % 7)


def test_the_report_is_in_mlflow_and_where_it_was_asked_for(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = make_runs()[:6]
    out = home / "elsewhere" / "report.html"
    assert main(["compare", *names, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    (folder,) = comparison_folders()
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    run = client.get_run(folder.info.id)
    assert (run.info.status, run.info.run_name, run.data.tags["role"]) == ("FINISHED", "compare-1", "compare")
    assert run.data.metrics["compare/runs"] == 6
    assert {artifact.path for artifact in client.list_artifacts(folder.info.id, "figures")} == {
        "figures/compare.html",
        "figures/report.md",
    }
    page = (folder.figures / "compare.html").read_text()
    assert out.read_text() == page
    kept = client.download_artifacts(folder.info.id, "figures/compare.html", str(home))
    assert Path(kept).read_text() == page
    assert f"Report    {out}" in printed
    assert f"/runs/{folder.info.id}/artifacts/figures/compare.html" in printed
    # The headline, and the findings, are what people see of it in the UI.
    assert run.data.tags["mlflow.note.content"].splitlines()[0] in printed


def test_keys_that_find_no_room_in_a_terminal_are_told_run_by_run(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("lr", "beta1", "beta2", "weight_decay", "eps")
    other = [f"optimizer.{key}={value}" for key, value in zip(keys, (0.02, 0.8, 0.97, 0.3, 1e-6), strict=True)]
    other += ["schedule.warmup_steps=3", "stability.clip.kind=zclip", "model.moe.top_k=1", "model.init.std=0.01"]
    folders(Made("a", loss=3.0), Made("b", tuple(other), loss=4.0))
    assert main(["compare", "id-a", "id-b"]) == 0
    printed = capsys.readouterr().out
    (first, second) = re.findall(r"^#\d is .*$", printed, re.MULTILINE)
    assert first.startswith("#1 is a: ")
    assert second.startswith("#2 is b: ")
    assert "lr 0.02, " in second
    assert "warmup" not in printed.split("#1 is a")[0]  # no column, which would be a letter wide


def test_without_a_tracking_server_the_report_is_on_the_disk(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = make_runs()[:2]
    folder = RunFolder(home / "runs" / f"id-{names[0]}")
    write_json(folder.path / "run.json", {**vars(folder.info), "tracking_uri": "http://127.0.0.1:1"})
    assert main(["compare", *names]) == 2
    line = capsys.readouterr().err
    assert "MLflow at http://127.0.0.1:1 does not answer" in line
    kept = re.search(r"it is (\S+)\)", line)
    assert kept is not None
    assert Path(kept.group(1)).read_text().startswith("<!doctype html>")
    assert list(comparison_folders()) == []


@NEEDS_A_BROWSER
def test_the_page_is_drawn_from_the_disk(home: Path, page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    out = home / "compare.html"
    assert main(["compare", *make_runs(), "--out", str(out)]) == 0
    findings = [line.removeprefix("- ") for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    page.open(out.as_uri())
    text = page.wait_for_text("Which keys decide", "What is not comparable", *findings[:3])
    assert "NaN" not in text
    # Losses, two numeric keys, parallel coordinates, importance, layers, trade-off.
    assert len(page.wait(PLOTS)) == 7
    assert findings[0].startswith("optimizer.lr 0.03 with stability.clip.kind none diverged in 6 of 6 runs")
    page.keep_screenshot("compare")
    page.wait(PLOTS)
    assert page.errors() == []


@NEEDS_A_BROWSER
def test_the_page_is_drawn_in_the_mlflow_ui(home: Path, page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(home / "mlflow.db", home / "server.log")
    server.start()
    try:
        names = make_runs()
        for name in names:
            folder = RunFolder(home / "runs" / f"id-{name}")
            write_json(folder.path / "run.json", {**vars(folder.info), "tracking_uri": server.uri})
        assert main(["compare", *names]) == 0
        (link,) = re.findall(r"^in MLflow (http\S+)$", capsys.readouterr().out, re.MULTILINE)
        page.open(link)
        page.wait(INNER)
        page.browser.switch_to.frame(0)
        assert len(page.wait(PLOTS)) == 7
        page.browser.switch_to.default_content()
        page.keep_screenshot("compare-in-mlflow")
    finally:
        server.kill()
