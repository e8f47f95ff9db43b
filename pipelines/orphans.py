"""Runs whose driver vanished: their lock is free, and nothing else ended them."""

import logging
import threading

from pipelines.delivery import Delivery
from pipelines.ending import end_if_orphaned, parent_ending
from pipelines.errors import UserError, first_line
from pipelines.run_folder import RunFolder, parent_folders, run_folders, write_json
from pipelines.run_lock import RunBusyError, RunLock, run_lock
from pipelines.tracking_store import TrackingStore, shown, store_errors

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


def end_orphaned_parents(store: TrackingStore) -> None:
    """End the studies, sweeps, replays and comparisons whose driver vanished.

    Their trials are runs, which `end_orphans` ends.
    """
    for folder in parent_folders():
        if folder.ending.exists() or folder.info.tracking_uri != shown(store.uri):
            continue
        try:
            lock = RunLock(folder)
        except RunBusyError:
            continue
        with store_errors(store.uri):
            try:
                write_json(folder.ending, parent_ending("KILLED", "Stopped: its driver vanished.", {}))
                Delivery(store.client, folder).send()
            finally:
                lock.release()


def end_orphans_in_background(store: TrackingStore, parents: bool = False) -> None:
    """`end_orphans` in a thread: a new run need not wait for old ones. With ``parents`` theirs end as well.

    Whoever is a parent ends the others before it is one, for this thread would hold a lock that it is to take.
    """

    def end_all() -> None:
        end_orphans(store)
        try:
            if parents:
                end_orphaned_parents(store)
        except (UserError, OSError) as error:
            _log.info("parents are left as they are: %s", first_line(error))

    threading.Thread(target=end_all, name="orphans", daemon=True).start()


def _is_unfinished(folder: RunFolder, store: TrackingStore) -> bool:
    return not folder.is_delivered and folder.info.tracking_uri == shown(store.uri)
