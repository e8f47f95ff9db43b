"""Which records of a run MLflow may have, and under which names: it cannot take a point back.

Training may go back some steps, so the newest ones wait until that cannot happen any more. What is taken back while it
waits goes to ``rewound/*``, so that ``train/*`` has one value a step. Where training goes back farther, to a
checkpoint, MLflow keeps what it has of those steps, and does not get their other values; the run's own file has both.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace

from pipelines.spool import REWIND, START, TRAIN, Record

_REWOUND_NAMES = {
    "train/loss": "rewound/loss",
    "train/grad_norm": "rewound/grad_norm",
    "val/loss": "rewound/val_loss",
    # Of the spike that training went back for.
    "spike/loss_at_spike": "spike/loss_at_spike",
}


class Outbox:
    """Records on their way, in the order of the spool."""

    def __init__(self, lag_steps: int, delivered: Mapping[str, int]) -> None:
        """``delivered``: of each kind of record the last step that MLflow has; see `delivered`."""
        self._lag = lag_steps
        self._delivered = dict(delivered)
        self._waiting: deque[Record] = deque()
        self._newest = 0

    @property
    def delivered(self) -> dict[str, int]:
        """Of each kind of record the last step that MLflow has."""
        return dict(self._delivered)

    def add(self, records: Iterable[Record]) -> None:
        """Take up newer records."""
        for record in records:
            if record.kind == REWIND:
                self._waiting = deque(_taken_back(r) if r.step > record.step else r for r in self._waiting)
                self._newest = min(self._newest, record.step)
            elif record.kind == TRAIN:
                self._newest = record.step
            self._waiting.append(record)

    def due(self, everything: bool) -> list[Record]:
        """The records whose turn it is, the oldest first; all of them if the run is over. They stay until `sent`.

        Those without metrics are markers or have nothing that MLflow does not know.
        """
        known = dict(self._delivered)
        found = []
        for record in self._waiting:
            held_back = record.kind not in (START, REWIND) and record.step > self._newest - self._lag
            if held_back and not everything and not _is_over(record):
                break
            found.append(self._without_known(record, known))
        return found

    def sent(self, records: Iterable[Record]) -> None:
        """The oldest of what is due has arrived."""
        for record in records:
            self._waiting.popleft()
            if record.metrics and not _is_over(record):
                self._delivered[record.kind] = max(record.step, self._delivered.get(record.kind, 0))

    @staticmethod
    def _without_known(record: Record, known: dict[str, int]) -> Record:
        if record.kind == START or _is_over(record):
            return record
        if record.step <= known.get(record.kind, 0):
            return replace(record, metrics={})
        known[record.kind] = record.step
        return record


def _is_over(record: Record) -> bool:
    """Whether it was of a timeline that is over, and has been renamed."""
    return record.kind.startswith("rewound")


def _taken_back(record: Record) -> Record:
    if record.kind in (START, REWIND) or _is_over(record):
        return record
    renamed = {_REWOUND_NAMES[name]: value for name, value in record.metrics.items() if name in _REWOUND_NAMES}
    return replace(record, kind=f"rewound {record.kind}", metrics=renamed)
