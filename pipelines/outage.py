"""Notices that the tracking server does not take what is delivered, and that it does again. For the driver."""

from pipelines.errors import first_line
from pipelines.operations import last_step, open_operations, record_operation, settle
from pipelines.run_folder import RunFolder
from pipelines.spike_event import Kind

_KINDS: tuple[Kind, ...] = ("tracking_outage",)


class Outage:
    """Writes down one event for each outage, however many deliveries fail. Training loses no time by it."""

    def __init__(self, folder: RunFolder) -> None:
        """An outage that an earlier driver met, and did not see the end of, is this one's to end."""
        self._folder = folder
        self._is_on = bool(open_operations(folder, _KINDS))

    def goes_on(self, error: Exception) -> None:
        """A delivery has failed."""
        if not self._is_on:
            self._is_on = True
            detail = f"MLflow at {self._folder.info.tracking_uri} takes nothing ({first_line(error)}); training goes on"
            record_operation(self._folder, _KINDS[0], "go_on", detail)

    def is_over(self) -> bool:
        """A delivery has succeeded. Whether that is the end of an outage."""
        was_on, self._is_on = self._is_on, False
        if was_on:
            settle(self._folder, _KINDS, last_step(self._folder.spool))
        return was_on
