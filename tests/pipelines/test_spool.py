import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipelines.spool import TRAIN, VALIDATION, SpoolReader, SpoolWriter
from tests.full_disk import full_disk


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def lines(spool: Path) -> list[dict[str, Any]]:
    """The file as strict JSON, in which NaN and Infinity are no values."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the spool")

    return [json.loads(line, parse_constant=refuse) for line in spool.read_text().splitlines()]


def test_a_reader_gets_what_was_written_since_its_last_look(spool: Path) -> None:
    reader = SpoolReader(spool)
    assert reader.read() == []
    with SpoolWriter(spool) as writer:
        writer.write(TRAIN, 1, {"train/loss": 0.1 + 0.2})
        (first,) = reader.read()
        assert (first.kind, first.step, first.metrics) == (TRAIN, 1, {"train/loss": 0.1 + 0.2})
        assert reader.read() == []
        writer.write(TRAIN, 2, {"train/loss": 1.0})
        writer.write(VALIDATION, 2, {"val/loss": 2.0})
        assert [(record.kind, record.step) for record in reader.read()] == [(TRAIN, 2), (VALIDATION, 2)]


def test_a_torn_last_line_is_left_until_it_is_whole(spool: Path) -> None:
    with SpoolWriter(spool) as writer:
        writer.write(TRAIN, 1, {"train/loss": 1.0})
        writer.write(TRAIN, 2, {"train/loss": 2.0})
    whole = spool.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole)):
        spool.write_bytes(whole[:cut])
        reader = SpoolReader(spool)
        assert [record.step for record in reader.read()] == [1]
        spool.write_bytes(whole)
        assert [record.step for record in reader.read()] == [2]


def test_opening_cuts_off_a_torn_last_line(spool: Path) -> None:
    with SpoolWriter(spool) as writer:
        writer.write(TRAIN, 1, {"train/loss": 1.0})
        writer.write(TRAIN, 2, {"train/loss": 2.0})
    spool.write_bytes(spool.read_bytes()[:-5])
    with SpoolWriter(spool) as writer:
        writer.write(TRAIN, 2, {"train/loss": 2.0})
        writer.write(TRAIN, 3, {"train/loss": 3.0})
    assert [line["step"] for line in lines(spool)] == [1, 2, 3]


def test_steps_that_a_resumed_run_repeats_are_not_written_again(spool: Path) -> None:
    with SpoolWriter(spool) as writer:
        for step in range(1, 6):
            writer.write(TRAIN, step, {"train/loss": float(step)})
        writer.write(VALIDATION, 4, {"val/loss": 4.0})
    before = lines(spool)
    with SpoolWriter(spool) as writer:
        for step in range(3, 8):
            writer.write(TRAIN, step, {"train/loss": float(step)})
            writer.write(VALIDATION, step, {"val/loss": float(step)})
    after = lines(spool)
    assert after[: len(before)] == before
    new = [(line["kind"], line["step"]) for line in after[len(before) :]]
    assert new == [(VALIDATION, 5), (TRAIN, 6), (VALIDATION, 6), (TRAIN, 7), (VALIDATION, 7)]


def test_values_that_are_not_finite_are_named_and_not_written(spool: Path) -> None:
    with SpoolWriter(spool) as writer:
        writer.write(TRAIN, 1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 1e-3, "a": -math.inf})
    (line,) = lines(spool)
    assert line["metrics"] == {"train/lr": 1e-3}
    assert line["non_finite"] == ["train/loss", "train/grad_norm", "a"]
    (record,) = SpoolReader(spool).read()
    assert record.non_finite == ("train/loss", "train/grad_norm", "a")


def test_on_a_full_disk_records_wait_until_there_is_room(spool: Path, caplog: pytest.LogCaptureFixture) -> None:
    with SpoolWriter(spool) as writer:
        writer.write(TRAIN, 1, {"train/loss": 1.0})
        with full_disk(spool.stat().st_size + 20):
            writer.write(TRAIN, 2, {"train/loss": 2.0})
            writer.write(TRAIN, 3, {"train/loss": 3.0})
        assert [message.split(":")[0] for message in caplog.messages] == [
            "metrics of step 2 and on are not on the disk yet"
        ]
        assert [record.step for record in SpoolReader(spool).read()] == [1]
        writer.write(TRAIN, 4, {"a": 4.0})
    assert [line["step"] for line in lines(spool)] == [1, 2, 3, 4]


def test_what_found_no_room_to_the_end_is_counted(spool: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = SpoolWriter(spool)
    writer.write(TRAIN, 1, {"train/loss": 1.0})
    with full_disk(spool.stat().st_size + 20):
        writer.write(TRAIN, 2, {"train/loss": 2.0})
        writer.close()
    assert caplog.messages[-1].startswith("1 records of metrics are lost: ")
    assert [line["step"] for line in lines(spool)] == [1]
