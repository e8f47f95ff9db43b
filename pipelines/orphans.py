"""Runs whose driver vanished: their lock is free, and nothing else ended them."""

import logging
import threading

from pipelines.delivery import Delivery
from pipelines.ending import end_if_orphaned
from pipelines.errors import UserError, first_line
from pipelines.run_folder import RunFolder, run_folders
from pipelines.run_lock import run_lock
from pipelines.tracking_store import TrackingStore, shown

_log = logging.getLogger(__name__)


def end_orphans(store: TrackingStore, spared: str | None = None) -> None:
    """End the orphans among the runs that ``store`` tracks, and send it what of ended runs it did not get.

    What cannot be sent now is tried again the next time that somebody comes by. Trials of the parent with the id
    ``spared`` that have no ending are left alone, for whoever takes them up again.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for folder in run_folders():
        try:
            is_spared = spared is not None and folder.info.parent == spared and not folder.ending.exists()
            if is_spared or not _is_unfinished(folder, store):
                continue
            with run_lock(folder):
                if not folder.ending.exists() and store.client.get_run(folder.info.id).info.status != "RUNNING":
                    continue  # the driver told MLflow the end, and had no room on its disk to write it down
                end_if_orphaned(folder)
                Delivery(store.client, folder).send()
        except (UserError, MlflowException, SQLAlchemyError, OSError, ValueError) as error:
            # Most often because the run is alive, in another process.
            _log.info("run %s is left as it is: %s", folder.path.name, first_line(error))


def end_orphans_in_background(store: TrackingStore) -> None:
    """`end_orphans` in a thread: a new run need not wait for old ones."""
    threading.Thread(target=end_orphans, args=(store,), name="orphans", daemon=True).start()


def _is_unfinished(folder: RunFolder, store: TrackingStore) -> bool:
    return not folder.is_delivered and folder.info.tracking_uri == shown(store.uri)
