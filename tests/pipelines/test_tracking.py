import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import mlflow
import pytest

from pipelines.ending import DESCRIPTION_TAG
from pipelines.errors import UserError
from pipelines.flatten import flatten
from pipelines.loading import load_config
from pipelines.run_folder import find_run
from pipelines.spool import TRAIN, SpoolWriter
from pipelines.tracking import Tracker, log_params
from pipelines.tracking_store import TrackingStore, open_store, open_store_in_background, tracking_uri
from tests.pipelines.tracked import DATASET, config, points, train


def test_a_finished_run_is_all_in_mlflow(store: TrackingStore, home: Path) -> None:
    chosen = config(parallel={"workers": 2, "expert_parallel": 2})
    with Tracker.start(chosen, store, dataset=DATASET, preset="recipes/tiny") as tracker:
        folder = tracker.folder
        assert store.client.get_run(tracker.info.id).info.status == "RUNNING"
        train(folder, 1, 600)
        folder.figures.mkdir()
        (folder.figures / "training.png").write_bytes(b"a picture")
    assert tracker.undelivered is None

    run = store.client.get_run(tracker.info.id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny-1")
    assert points(store.client, folder, "train/loss") == [(step, 5 / step) for step in range(1, 601)]
    assert points(store.client, folder, "val/loss") == [(600, 0.01)]
    assert points(store.client, folder, "final/loss") == [(0, 0.0083)]
    assert points(store.client, folder, "final/val_loss") == [(0, 0.01)]
    assert points(store.client, folder, "final/diverged") == [(0, 0.0)]

    assert run.data.params["parallel.expert_parallel"] == "2"
    assert run.data.params["optimizer.lr"] == "0.001"
    assert run.data.params["tracking.uri"] == "null"
    assert run.data.params.keys() == flatten(chosen).keys()
    tags = run.data.tags
    assert (tags["role"], tags["diverged"]) == ("train", "false")
    assert tags[DESCRIPTION_TAG] == (
        "Trained a 4-layer MoE (16 experts, top-2) for 600 steps on 2 workers, EP 2: val/loss 0.010 nats per token."
    )
    assert run.inputs is not None
    (entry,) = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("stdlib", DATASET.digest[:36])
    assert json.loads(entry.dataset.profile or "") == {"tokens": 1000, "documents": 7, "digest": DATASET.digest}

    artifacts = home / "mlartifacts" / tracker.info.id / "artifacts"
    assert load_config([str(artifacts / "config.yaml")]) == chosen
    made_with = json.loads((artifacts / "environment.json").read_text())
    assert made_with["packages"]["mlflow"] == mlflow.__version__
    assert (artifacts / "figures" / "training.png").read_bytes() == b"a picture"
    assert find_run("tiny-1") == folder


def stop(error: BaseException) -> Callable[[], NoReturn]:
    def end() -> NoReturn:
        raise error

    return end


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        (
            stop(ValueError("bad\nmore")),
            "FAILED",
            r"Failed while training a .*, at step 3 \(ValueError: bad\): val/loss 2.000",
        ),
        (stop(KeyboardInterrupt()), "KILLED", r"Stopped while training a .*, at step 3 \(interrupted\): val/loss"),
        (stop(SystemExit(1)), "FAILED", "SystemExit: 1"),
        (stop(SystemExit(0)), "FINISHED", "Trained"),
    ],
)
def test_every_way_out_ends_the_run_truly(
    store: TrackingStore, end: Callable[[], NoReturn], status: str, words: str
) -> None:
    with pytest.raises(BaseException) as left, Tracker.start(config(), store, dataset=DATASET) as tracker:  # noqa: PT012
        train(tracker.folder, 1, 3)
        end()
    assert not isinstance(left.value, UserError)
    run = store.client.get_run(tracker.info.id)
    assert run.info.status == status
    assert run.data.metrics["final/loss"] == round(5 / 3, 4)
    assert points(store.client, tracker.folder, "train/loss")[-1] == (3, 5 / 3)
    assert re.search(words, run.data.tags[DESCRIPTION_TAG])


def test_the_driver_may_say_how_a_run_ended(store: TrackingStore) -> None:
    with Tracker.start(config(), store, dataset=DATASET) as tracker:
        tracker.end_as("FAILED", "a worker ran out of memory")
    run = store.client.get_run(tracker.info.id)
    assert run.info.status == "FAILED"
    assert "(a worker ran out of memory)" in run.data.tags[DESCRIPTION_TAG]


def test_a_resumed_run_is_the_same_run_with_every_point_once(store: TrackingStore) -> None:
    with pytest.raises(KeyboardInterrupt), Tracker.start(config(), store, dataset=DATASET) as first:  # noqa: PT012
        train(first.folder, 1, 250)
        raise KeyboardInterrupt
    longer = config(schedule={"kind": "simple", "steps": 700, "warmup_steps": 0})
    with Tracker.start(longer, store, dataset=DATASET, resume=find_run("latest")) as second:
        assert second.info == first.info
        assert store.client.get_run(first.info.id).info.status == "RUNNING"
        train(second.folder, 201, 700)
    run = store.client.get_run(first.info.id)
    assert run.info.status == "FINISHED"
    assert points(store.client, second.folder, "train/loss") == [(step, 5 / step) for step in range(1, 701)]
    assert points(store.client, second.folder, "val/loss") == [(250, 6 / 250), (700, 6 / 700)]
    assert run.data.metrics["final/loss"] == round(5 / 700, 4)
    assert run.data.params["schedule.steps"] == "600"
    assert run.data.tags["resumed.schedule.steps"] == "700"
    assert [tag for tag in run.data.tags if tag.startswith("resumed.")] == ["resumed.schedule.steps"]
    assert len(store.client.search_runs([first.info.experiment_id])) == 1


def test_a_run_is_not_resumed_in_another_store_or_experiment(
    store: TrackingStore, empty_database: Path, tmp_path: Path
) -> None:
    with Tracker.start(config(), store, dataset=DATASET) as tracker:
        pass
    other = open_store(f"sqlite:///{empty_database}")
    with pytest.raises(UserError, match=rf"tracking.uri: run run-1 .* is not in .*; it was tracked in .*{tmp_path}"):
        Tracker.start(config(), other, dataset=DATASET, resume=tracker.folder)
    elsewhere = config(tracking={"experiment": "other"})
    with pytest.raises(UserError, match=r"tracking\.experiment: a run stays in its experiment"):
        Tracker.start(elsewhere, store, dataset=DATASET, resume=tracker.folder)
    assert store.client.get_run(tracker.info.id).info.status == "FINISHED"
    store.client.delete_run(tracker.info.id)
    with pytest.raises(UserError, match="was deleted there"):
        Tracker.start(config(), store, dataset=DATASET, resume=tracker.folder)


def test_not_a_number_never_reaches_mlflow(store: TrackingStore) -> None:
    with Tracker.start(config(), store, dataset=DATASET) as tracker, SpoolWriter(tracker.folder.spool) as writer:
        writer.write(TRAIN, 1, {"train/loss": 2.0, "train/grad_norm": 1.0})
        writer.write(TRAIN, 2, {"train/loss": math.nan, "train/grad_norm": math.inf})
        writer.write(TRAIN, 3, {"train/loss": math.nan, "train/grad_norm": 1.0})
    run = store.client.get_run(tracker.info.id)
    assert points(store.client, tracker.folder, "train/loss") == [(1, 2.0)]
    assert points(store.client, tracker.folder, "train/grad_norm") == [(1, 1.0), (3, 1.0)]
    assert run.data.tags["diverged"] == "true"
    assert run.data.tags["non_finite"] == "train/loss from step 2, train/grad_norm from step 2"
    assert (run.data.metrics["final/loss"], run.data.metrics["final/diverged"]) == (2.0, 1.0)
    assert "the loss diverged" in run.data.tags[DESCRIPTION_TAG]


def test_params_stay_within_the_limits_of_mlflow(store: TrackingStore) -> None:
    run = store.client.create_run(store.experiment_id("limits"))
    values = {f"a.b{number}": number for number in range(250)}
    log_params(store, run, {**values, "long": "x" * 10_000, "exact": "y" * 6000, "on": True, "none": None})
    params = store.client.get_run(run.info.run_id).data.params
    assert len(params) == 254
    assert params["a.b249"] == "249"
    assert params["long"] == "x" * 5999 + "…"
    assert params["exact"] == "y" * 6000
    assert (params["on"], params["none"]) == ("true", "null")


def test_the_config_decides_on_the_store_before_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(config().tracking) == f"sqlite:///{home}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1234")
    assert tracking_uri(config().tracking) == "http://127.0.0.1:1234"
    monkeypatch.chdir(home)
    assert tracking_uri(config(tracking={"uri": "sqlite:///my.db"}).tracking) == f"sqlite:///{home}/my.db"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://me:secret@127.0.0.1:9", "tracking.uri: MLflow at http://127.0.0.1:9 does not answer"),
        ("sqlite:////proc/no/mlflow.db", "cannot be opened as an SQLite database"),
        ("sqlite:///{text}", "cannot be opened as an SQLite database: file is not a database"),
        ("nonsense://x", "tracking.uri: MLflow at nonsense://x: "),
        ("file:///tmp/mlruns", "tracking.uri: MLflow at file:///tmp/mlruns: "),
    ],
)
def test_a_store_that_cannot_be_used_is_the_users_to_mend(tmp_path: Path, uri: str, message: str) -> None:
    text = tmp_path / "text"
    text.write_text("this is no database, " * 100)
    with pytest.raises(UserError, match=message) as refused:
        open_store_in_background(uri.format(text=text)).result()
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_server_of_the_environment_that_is_gone_is_named_by_its_variable(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        open_store("http://127.0.0.1:9")
    assert str(caught.value).startswith("MLFLOW_TRACKING_URI: MLflow at http://127.0.0.1:9 does not answer; start it ")
    assert str(caught.value).endswith(f"tracking.uri=sqlite:///{home / 'mlflow.db'}")


def test_a_deleted_experiment_is_named(store: TrackingStore) -> None:
    store.client.delete_experiment(store.experiment_id("gone"))
    with pytest.raises(UserError, match=r"tracking\.experiment: 'gone' is deleted in"):
        Tracker.start(config(tracking={"experiment": "gone"}), store, dataset=DATASET)


def test_a_run_keeps_its_name_unless_resuming_gives_another(store: TrackingStore) -> None:
    named = config(tracking={"run_name": "mine"})
    with Tracker.start(named, store, dataset=DATASET):
        pass
    with Tracker.start(named, store, dataset=DATASET) as tracker:
        assert tracker.info.name == "mine-2"
    with Tracker.start(named, store, dataset=DATASET, resume=tracker.folder) as again:
        assert again.info.name == "mine-2"
    renamed = config(tracking={"run_name": "yours"})
    with Tracker.start(renamed, store, dataset=DATASET, resume=tracker.folder) as again:
        assert again.info.name == "yours"
    assert find_run("yours").path == tracker.folder.path
    assert store.client.get_run(tracker.info.id).info.run_name == "yours"
