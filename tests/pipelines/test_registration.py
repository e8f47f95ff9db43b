"""Checkpoints as logged models, in a real MLflow database."""

import shutil
from pathlib import Path

import pytest

from pipelines.delivery import Delivery, deliver
from pipelines.registration import MODEL_TYPE
from pipelines.run_folder import read_json
from pipelines.tracking import Tracker
from pipelines.tracking_store import TrackingStore
from tests.pipelines.small_run import metrics_of, run_loop, small_config
from tests.pipelines.tracked import DATASET, checkpoint, checkpoints_in, config, train


def test_the_checkpoints_that_retention_keeps_are_found_with_their_losses(store: TrackingStore) -> None:
    settings = ("checkpoint.every_steps=5", "checkpoint.keep=2", "tracking.run_name=kept")
    with Tracker.start(small_config(*settings), store, dataset=DATASET) as tracker:
        folder = tracker.folder
        run_loop(0, 1, folder.path, settings)
    assert tracker.undelivered is None
    trained, validated = metrics_of(folder.path), metrics_of(folder.path, "validation")
    assert checkpoints_in(store.client, folder) == {
        f"kept-step{step:08}": {
            "train/loss": trained[step]["train/loss"],
            **{name: validated[step][name] for name in ("val/loss", "val/nats_per_byte", "moe/max_vio_global")},
        }
        for step in (10, 12)
    }
    (newest, _) = store.client.search_logged_models([folder.info.experiment_id])
    assert newest.model_type == MODEL_TYPE
    assert newest.source_run_id == folder.info.id
    assert newest.params == {"step": "12", "path": str(folder.checkpoints / "step-00000012")}
    # The run itself has each of these points once, as without checkpoints.
    assert len(store.client.get_metric_history(folder.info.id, "train/loss")) == 12


def test_what_is_removed_from_the_disk_is_removed_from_mlflow_while_the_run_goes_on(store: TrackingStore) -> None:
    # Not entered before the end: the tracker's own thread would deliver beside this test.
    tracker = Tracker.start(config(), store, dataset=DATASET)
    folder = tracker.folder
    train(folder, 1, 300)
    for step in (100, 200, 300):
        checkpoint(folder, step)
    delivery = Delivery(store.client, folder)
    delivery.send()
    assert checkpoints_in(store.client, folder).keys() == {f"run-1-step00000{step}" for step in (100, 200, 300)}
    shutil.rmtree(folder.checkpoints / "step-00000100")
    # Removed before the registry came to see it.
    shutil.rmtree(checkpoint(folder, 150))
    delivery.send()
    assert checkpoints_in(store.client, folder).keys() == {f"run-1-step00000{step}" for step in (200, 300)}
    assert delivery.checkpoints_left() == 0
    with tracker:
        pass
    assert checkpoints_in(store.client, folder).keys() == {f"run-1-step00000{step}" for step in (200, 300)}


def test_a_crash_at_any_point_leaves_no_double_and_no_half(store: TrackingStore) -> None:
    with Tracker.start(config(), store, dataset=DATASET) as tracker:
        train(tracker.folder, 1, 20)
    folder, client = tracker.folder, store.client
    paths = [checkpoint(folder, step) for step in (10, 20)]
    # As after a crash between making the first model and all the rest.
    client.create_logged_model(
        folder.info.experiment_id,
        name="run-1-step00000010",
        source_run_id=folder.info.id,
        params={"step": "10", "path": str(paths[0])},
        model_type=MODEL_TYPE,
    )
    expected = {
        "run-1-step00000010": {"train/loss": 5 / 10},
        "run-1-step00000020": {"train/loss": 5 / 20, "val/loss": 6 / 20},
    }
    assert deliver(folder) is None
    assert checkpoints_in(client, folder) == expected
    registered = read_json(folder.registered)
    folder.registered.unlink()
    assert deliver(folder) is None
    assert checkpoints_in(client, folder) == expected
    assert read_json(folder.registered) == registered


def test_a_model_that_a_crash_left_unknown_goes_with_its_checkpoint(store: TrackingStore) -> None:
    with Tracker.start(config(), store, dataset=DATASET) as tracker:
        path = checkpoint(tracker.folder, 10)
    tracker.folder.registered.unlink()
    shutil.rmtree(path)
    checkpoint(tracker.folder, 20)
    assert deliver(tracker.folder) is None
    assert checkpoints_in(store.client, tracker.folder).keys() == {"run-1-step00000020"}


def test_a_checkpoint_without_a_manifest_is_none(store: TrackingStore) -> None:
    with Tracker.start(config(), store, dataset=DATASET) as tracker:
        (tracker.folder.checkpoints / "step-00000010").mkdir(parents=True)
        (tracker.folder.checkpoints / ".step-00000020").mkdir()
    assert tracker.undelivered is None
    assert checkpoints_in(store.client, tracker.folder) == {}


def test_any_name_of_a_run_makes_a_name_that_mlflow_takes(store: TrackingStore) -> None:
    with Tracker.start(config(tracking={"run_name": "lr=0.001: 5% 'a/b'"}), store, dataset=DATASET) as tracker:
        checkpoint(tracker.folder, 7)
    assert tracker.undelivered is None
    assert checkpoints_in(store.client, tracker.folder) == {"lr=0-001- 5- -a-b--step00000007": {}}


def test_what_a_user_has_deleted_in_the_ui_stays_deleted(store: TrackingStore) -> None:
    with Tracker.start(config(), store, dataset=DATASET) as tracker:
        path = checkpoint(tracker.folder, 7)
    (model,) = store.client.search_logged_models([tracker.info.experiment_id])
    store.client.delete_logged_model(model.model_id)
    assert deliver(tracker.folder) is None
    assert checkpoints_in(store.client, tracker.folder) == {}
    shutil.rmtree(path)
    assert deliver(tracker.folder) is None


@pytest.mark.parametrize("known", [True, False])
def test_a_resumed_run_does_not_register_anew(store: TrackingStore, known: bool) -> None:
    with Tracker.start(config(), store, dataset=DATASET) as first:
        train(first.folder, 1, 10)
        checkpoint(first.folder, 10)
    before = [model.model_id for model in store.client.search_logged_models([first.info.experiment_id])]
    if not known:
        first.folder.registered.unlink()
    renamed = config(tracking={"run_name": "another"})
    with Tracker.start(renamed, store, dataset=DATASET, resume=first.folder):
        train(first.folder, 11, 20)
        checkpoint(first.folder, 20)
    assert checkpoints_in(store.client, first.folder).keys() == {"run-1-step00000010", "another-step00000020"}
    assert before[0] in Path(first.folder.registered).read_text()
