"""How saved views get into an experiment, where the MLflow UI finds them.

Besides those that every experiment gets, each sweep has one of its own. The UI makes no view once an experiment has
forty, so that the oldest sweeps' give way: what an old link opened is written again by whoever publishes it again.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipelines.errors import first_line
from pipelines.saved_view import TAG_PREFIX, View, read_state
from pipelines.sweep_view import KEY_PREFIX
from pipelines.views import VIEWS

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DESCRIPTION_TAG = "mlflow.note.content"
# A description that begins so is this module's own.
_LEAD = "Charts of these runs:"
# With the general ones there are 28, which leaves users a dozen of their own.
MOST_SWEEPS = 20
"""So many of the newest sweeps of an experiment keep their views."""

_log = logging.getLogger(__name__)


def publish_views(client: "MlflowClient", experiment_id: str) -> None:
    """Give an experiment the views, where it has not got them as they are here, and a description that leads to them.

    A description that somebody has written stays, but a view that somebody has changed is written anew. Never raises
    what a store may answer: without views a run is as good as with them, so that is a warning.
    """
    with _failures_are_warnings():
        tags = client.get_experiment(experiment_id).tags
        for view in VIEWS:
            _write(client, experiment_id, view, tags)
        description = _description(experiment_id)
        known = tags.get(_DESCRIPTION_TAG, "")
        if known != description and (not known or known.startswith(_LEAD)):
            client.set_experiment_tag(experiment_id, _DESCRIPTION_TAG, description)


def publish_sweep_view(client: "MlflowClient", experiment_id: str, view: View) -> None:
    """Give an experiment the view of one sweep (`sweep_view`), or bring it up to date; views of sweeps beyond the
    newest `MOST_SWEEPS` are dropped.

    What a store may answer is a warning, as for `publish_views`.
    """
    with _failures_are_warnings():
        tags = client.get_experiment(experiment_id).tags
        _write(client, experiment_id, view, tags)
        others = [tag for tag in tags if tag.startswith(TAG_PREFIX + KEY_PREFIX) and tag != view.tag]
        newest_first = sorted(others, key=lambda tag: _created_ms(tags[tag]), reverse=True)
        for tag in newest_first[MOST_SWEEPS - 1 :]:
            client.delete_experiment_tag(experiment_id, tag)


@contextmanager
def _failures_are_warnings() -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        _log.warning("the saved views of the MLflow UI are not up to date: %s", first_line(error))


def _write(client: "MlflowClient", experiment_id: str, view: View, tags: Mapping[str, str]) -> None:
    """Unless it is there as it is. The UI lists views by when they were made, so that this stays as it was."""
    old = tags.get(view.tag)
    if old is not None and _is_current(view, old):
        return
    now = time.time_ns() // 1_000_000
    client.set_experiment_tag(experiment_id, view.tag, view.to_tag((old and _created_ms(old)) or now, now))


def _description(experiment_id: str) -> str:
    """In Markdown. Links without an address lead on from whatever address the UI is looked at under."""
    links = (f"[{view.name}]({view.link(experiment_id).removeprefix('/')})" for view in VIEWS)
    return f"{_LEAD} {', '.join(links)}"


def _is_current(view: View, tag: str) -> bool:
    try:
        return read_state(tag) == view.to_state()
    except ValueError:
        return False


def _created_ms(tag: str) -> int:
    """0 where a tag does not say it."""
    try:
        return int(json.loads(tag)["createdAt"])
    except (ValueError, TypeError, KeyError):
        return 0
