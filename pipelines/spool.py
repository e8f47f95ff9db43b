"""The run's own record of its metrics: a file of JSON lines that training appends to and the driver reads.

A line is ``{"kind": str, "step": int, "time_ms": int, "metrics": {name: float}}``, with ``"non_finite": [name, ...]``
where values were NaN or infinite. Steps are optimizer steps, counted from 1; times are milliseconds since 1970. The
file is what MLflow is fed from, so training never waits for a tracking server, and nothing is lost when one is down.
Records are in the order in which things happened: training may go back, and then steps come again (`REWIND`).
"""

import errno
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

_log = logging.getLogger(__name__)

START = "start"
"""Kind of the one record of what is known before the first step, at step 0."""
TRAIN = "train"
"""Kind of the records of optimizer steps."""
VALIDATION = "validation"
"""Kind of the records of validations."""
REWIND = "rewind"
"""Kind of the records that training went back to the state after their step. Later records repeat the steps after it;
what those steps had measured before is of a timeline that is over."""

_MOST_WAITING = 10_000

_ENCODE = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


@dataclass(frozen=True)
class Record:
    """What was measured at one step."""

    kind: str
    step: int
    time_ms: int
    metrics: Mapping[str, float]
    non_finite: tuple[str, ...] = ()
    """Names of metrics that were NaN or infinite; they are not in ``metrics``."""
    end: int = field(default=0, compare=False)
    """Offset in bytes of the line's end in the file that it was read from."""

    @classmethod
    def measured(cls, kind: str, step: int, metrics: Mapping[str, float]) -> Self:
        """A record of this moment, its non-finite values set apart."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        lost = tuple(name for name in metrics if name not in finite)
        return cls(kind, step, time.time_ns() // 1_000_000, finite, lost)

    def to_line(self) -> bytes:
        """One line of JSON, its end included."""
        content: dict[str, Any] = {
            "kind": self.kind,
            "step": self.step,
            "time_ms": self.time_ms,
            "metrics": dict(self.metrics),
        }
        if self.non_finite:
            content["non_finite"] = list(self.non_finite)
        return _ENCODE(content).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes, end: int = 0) -> Self:
        """Inverse of `to_line`."""
        content = json.loads(line)
        lost = tuple(content.get("non_finite", ()))
        return cls(content["kind"], content["step"], content["time_ms"], content["metrics"], lost, end)


class SpoolReader:
    """Reads what has been added to a spool since the last call."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        """Start at a byte offset, which must be 0 or the end of a line. The file may not exist yet."""
        self.path = path
        self.offset = offset

    def read(self) -> list[Record]:
        """Records that are complete by now; a last line without its end is left for the next call."""
        records: list[Record] = []
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return records
        with file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.offset += len(line)
                records.append(Record.from_line(line, self.offset))
        return records


def span_ms(path: Path) -> tuple[int, int] | None:
    """When the first and the last record of a spool were made, in milliseconds since 1970; None without any."""
    times = [record.time_ms for record in SpoolReader(path).read()]
    return (times[0], times[-1]) if times else None


def live(records: Iterable[Record]) -> list[Record]:
    """The records of the timeline that holds, the rewinds themselves left out."""
    kept: list[Record] = []
    for record in records:
        if record.kind == REWIND:
            kept = [earlier for earlier in kept if earlier.step <= record.step]
        else:
            kept.append(record)
    return kept


def records_of_step(path: Path, step: int) -> list[Record]:
    """Records of one step, the last of each kind.

    Other lines are passed over without being parsed: a long run's file takes 0.1 s.
    """
    mark = f'"step":{step},'.encode()
    try:
        with path.open("rb") as file:
            found = [Record.from_line(line) for line in file if mark in line and line.endswith(b"\n")]
    except FileNotFoundError:
        return []
    return list({record.kind: record for record in found if record.kind != REWIND}.values())


class SpoolWriter:
    """Appends records; one process at a time may do so.

    Opening cuts off a last line that a killed writer left torn. A record whose step is not above the last one of its
    kind is skipped: a resumed run repeats steps bit for bit, and MLflow, which cannot delete points, must not get them
    twice with two times. After a rewind the steps that follow it are new ones.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        reader = SpoolReader(path)
        self._last_steps: dict[str, int] = {}
        self.rewinds = 0
        """Rewinds that the file tells of."""
        for record in reader.read():
            self._see(record.kind, record.step)
        self._end = reader.offset
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._file, self._end)
        self._waiting: deque[bytes] = deque(maxlen=_MOST_WAITING)
        self._failing = False

    def write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append one record with one write call.

        On a full disk records wait in memory for the next call, the newest 10,000 of them; training never notices.
        """
        if step <= self._last_steps.get(kind, -1):
            return
        self._append(kind, step, metrics)

    def rewind(self, step: int) -> None:
        """Record that training went back to the state after ``step``: the next steps are others than they were."""
        self._append(REWIND, step, {})

    def last_step(self, kind: str) -> int:
        """The last step of a kind in the timeline that holds, 0 without one."""
        return self._last_steps.get(kind, 0)

    def _see(self, kind: str, step: int) -> None:
        if kind == REWIND:
            self.rewinds += 1
            self._last_steps = {other: min(last, step) for other, last in self._last_steps.items()}
        else:
            self._last_steps[kind] = step

    def _append(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        self._see(kind, step)
        self._waiting.append(Record.measured(kind, step, metrics).to_line())
        try:
            self._flush()
        except OSError as error:
            if not self._failing:
                _log.warning("metrics of step %d and on are not on the disk yet: %s", step, error)
            self._failing = True
        else:
            self._failing = False

    def _flush(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            # At a fixed offset, so that the next attempt overwrites what a failed one left behind.
            written = os.pwrite(self._file, line, self._end)
            if written < len(line):
                raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes were taken")
            self._end += written
            self._waiting.popleft()

    def close(self) -> None:
        """Write what waits, if there is room now, cut off what a failed write may have left, and close the file."""
        try:
            self._flush()
        except OSError as error:
            _log.warning("%d records of metrics are lost: %s", len(self._waiting), error)
        os.ftruncate(self._file, self._end)
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
