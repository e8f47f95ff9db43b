import io
import struct
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.figure import draw_run
from pipelines.home import runs_dir
from pipelines.run_folder import RunFolder, RunInfo
from pipelines.spool import START, TRAIN, VALIDATION, SpoolWriter
from pipelines.summary import print_summary
from tests.pipelines.tracked import config


def run_with(uri: str) -> RunFolder:
    folder = RunFolder(runs_dir() / "abc123")
    folder.write_info(RunInfo("abc123", "tiny-1", "steadymoe", "7", "2026-05-01T10:00:00+00:00", uri))
    return folder


def summary(folder: RunFolder) -> str:
    output = io.StringIO()
    print_summary(folder, 125.0, Console(file=output, width=80))
    return output.getvalue()


@pytest.mark.usefixtures("home")
def test_the_table_holds_what_was_reached() -> None:
    folder = run_with("http://127.0.0.1:1234")
    with SpoolWriter(folder.spool) as writer:
        writer.write(START, 0, {"model/parameters": 1_912_345, "model/active_parameters": 830_000})
        for step in range(1, 2001):
            writer.write(TRAIN, step, {"train/loss": 1.23456, "train/tokens_per_second": 12_000 if step > 3 else 7})
        writer.write(VALIDATION, 2000, {"val/loss": 1.3, "val/nats_per_byte": 1.25, "moe/max_vio_global": 0.0812})
        writer.write(VALIDATION, 2001, {"moe/dead_experts": 0})
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in summary(folder).splitlines() if "│" in line]
    assert rows == [
        ["training loss", "1.2346 nats per token"],
        ["validation loss", "1.3000 nats per token"],
        ["", "1.2500 nats per byte"],
        ["MaxVio over validation", "0.081"],
        ["dead experts", "0"],
        ["steps", "2,000"],
        ["speed", "12,000 tokens/s"],
        ["time", "2:05"],
        ["model", "1.9 M parameters, 830 k active"],
    ]


def test_a_local_run_says_how_to_open_it(home: Path) -> None:
    database = f"sqlite:///{home}/mlflow.db"
    lines = summary(run_with(database)).splitlines()
    command = next(line for line in lines if "-m mlflow server" in line)
    for part in (
        "--host 127.0.0.1 --port 5000",
        f"--backend-store-uri {database} ",
        f"-destination {home}/mlartifacts",
        f"--default-artifact-root file://{home}/mlartifacts ",
    ):
        assert part in command
    assert any(str(home / "runs" / "abc123") in line for line in lines)
    link = "http://127.0.0.1:5000/#/experiments/7/runs"
    view = "workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=training"
    assert any(line.endswith(f" {link}/abc123?workflowType=machine_learning") for line in lines)
    assert any(line.endswith(f" {link}?{view}") for line in lines)
    (home / "Makefile").write_text("ui:\n")
    assert f"make -C {home} ui" in summary(run_with(database))


@pytest.mark.usefixtures("home")
def test_a_server_is_linked_to_without_its_password() -> None:
    text = summary(run_with("https://me:secret@tracking.example/"))
    assert "https://tracking.example/#/experiments/7/runs/abc123?workflowType=machine_learning" in text
    assert "secret" not in text
    assert "mlflow server" not in text


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("steps", [0, 1, 500])
def test_the_picture_can_be_drawn_of_any_run(steps: int) -> None:
    folder = run_with("http://127.0.0.1:1234")
    with SpoolWriter(folder.spool) as writer:
        for step in range(1, steps + 1):
            writer.write(TRAIN, step, {"train/loss": 5 / step, "train/grad_norm": 1.0, "train/lr": 1e-3})
    content = draw_run(folder, config()).read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (1600, 1000)
