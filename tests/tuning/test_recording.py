import math
from pathlib import Path

from moe.report import Report
from moe.schedule import Timeline
from pipelines.loop import StepDone
from pipelines.run_folder import RunFolder
from tests.moe.tiny import tiny_config
from tuning.recording import SeriesRecorder, read_series, series_file

MOMENT = Timeline(tiny_config()).at(0)


NAMES = {"loss": "train/loss", "norm": "train/grad_norm", "vio": "moe/max_vio_batch", "clipped": "train/clipped"}


def done(step: int, validation: dict[str, float] | None = None, **metrics: float) -> StepDone:
    """A step that took as many seconds as its number."""
    reported = {NAMES[name]: value for name, value in metrics.items()} | {"train/lr": 0.1}
    return StepDone(Report(step, True, MOMENT, reported), float(step), validation)


def shown(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def test_a_step_that_lacks_a_metric_has_nan_in_its_place(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    recorder = SeriesRecorder(folder, 9)
    recorder.add(done(1, loss=5.0, norm=1.0))
    recorder.add(done(2, {"val/loss": 4.5}, loss=4.0, norm=2.0, clipped=1.0))
    recorder.add(done(3, loss=3.0))
    recorder.add(done(4, {"val/loss": 2.5, "moe/dead_experts": 1.0}, loss=2.0, norm=3.0, clipped=0.0))
    recorder.series("finished").write(series_file(folder))
    series = read_series(folder)
    assert {name: shown(list(values)) for name, values in series.train.items()} == {
        "train/loss": [5.0, 4.0, 3.0, 2.0],
        "train/grad_norm": [1.0, 2.0, None, 3.0],
        "train/step_seconds": [1.0, 2.0, 3.0, 4.0],
        "train/clipped": [None, 1.0, None, 0.0],
    }
    assert (series.outcome, series.steps) == ("finished", 9)
    assert series.validation == {"val/loss": 2.5, "moe/dead_experts": 1.0}


def test_a_restarted_trial_goes_on_with_what_it_has_recorded(tmp_path: Path) -> None:
    first = SeriesRecorder(RunFolder(tmp_path), 3)
    first.add(done(1, loss=5.0))
    first.add(done(2, {"val/loss": 4.5}, loss=4.0))
    first.close()
    second = SeriesRecorder(RunFolder(tmp_path), 3)
    second.add(done(2, {"val/loss": 4.5}, loss=4.0))
    second.add(done(3, loss=3.0))
    series = second.series("finished")
    assert series.train == {"train/loss": [5.0, 4.0, 3.0], "train/step_seconds": [1.0, 2.0, 3.0]}
    assert series.validation == {"val/loss": 4.5}


def test_a_metric_that_no_step_has_is_not_there(tmp_path: Path) -> None:
    recorder = SeriesRecorder(RunFolder(tmp_path), 1)
    recorder.add(done(1, loss=5.0, norm=1.0, vio=0.5))
    series = recorder.series("diverged")
    assert set(series.train) == {"train/loss", "train/grad_norm", "train/step_seconds", "moe/max_vio_batch"}
    assert series.validation == {}


def test_a_run_that_did_no_step_leaves_an_empty_series(tmp_path: Path) -> None:
    assert SeriesRecorder(RunFolder(tmp_path), 3).series("diverged").train == {}
