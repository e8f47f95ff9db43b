"""The list of a run's events and the list of runs, as people and scripts get them."""

import io
import json
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.errors import UserError
from pipelines.home import runs_dir
from pipelines.run_folder import RunFolder, RunInfo, write_json
from pipelines.run_list import newest_records, print_runs
from pipelines.run_lock import RunLock
from pipelines.spike_event import SpikeEvent
from pipelines.spike_list import event_as_json, events_as_json, find_event, print_events
from pipelines.spool import TRAIN, VALIDATION, SpoolWriter
from tests.pipelines.spiky import outcome, record, spike

pytestmark = pytest.mark.usefixtures("home")


YEAR = time.localtime().tm_year


def run(name: str, created: str = f"{YEAR}-05-01T12:00:00+00:00", parent: str | None = None) -> RunFolder:
    folder = RunFolder(runs_dir() / f"id-of-{name}")
    folder.write_info(RunInfo(f"id-of-{name}", name, "steadymoe", "7", created, "http://127.0.0.1:1", parent))
    return folder


def spiky_run() -> tuple[RunFolder, list[SpikeEvent]]:
    """A run with a spike that it recovered from, one that ended it, and a worker's death."""
    folder = run("tiny-1")
    bare = {**dict.fromkeys(("value", "baseline", "score", "rewound_to", "threshold")), "layers": (), "samples": ()}
    events = [
        spike(1123),
        spike(1200, id="worker_death-001200", kind="worker_death", action="restart_workers", **bare),
        spike(1300, id="non_finite-001300-t1", kind="non_finite", action="abort", timeline=1, **bare),
    ]
    record(folder, events[0], outcome("recovered", 1173))
    record(folder, events[1])
    record(folder, events[2], outcome("aborted", 1300, steps_lost=1))
    return folder, events


def printed(width: int, what: str = "events") -> str:
    output = io.StringIO()
    console = Console(file=output, width=width)
    if what == "events":
        print_events(RunFolder(runs_dir() / "id-of-tiny-1"), console)
    else:
        print_runs(3, what == "all", console)
    return output.getvalue()


def lines_of(text: str) -> list[str]:
    """The lines that are not empty, with single spaces between words."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def test_the_list_has_a_line_an_event() -> None:
    spiky_run()
    heading, _, first, second, third, *rest = lines_of(printed(160))
    assert heading == "id step kind value (usual) score action outcome steps lost"
    assert first == "1 loss-001123 1,123 loss 9.125 (3.25) 41.0 rewind skip samples recovered 6"
    assert second == "2 worker_death-001200 1,200 worker death restart workers open"
    assert third == "3 non_finite-001300-t1 1,300 non finite abort aborted 1"
    assert rest == [
        "2 spikes (1 loss, 1 non_finite), 7 steps lost. One of them in full: steadymoe spikes tiny-1 1",
    ]


def test_a_narrow_terminal_loses_nothing() -> None:
    spiky_run()
    text = printed(80)
    assert "…" not in text
    for part in ("1,123", "9.125", "41.0", "recovered", "finite", "restart", "aborted"):
        assert part in text


def test_a_run_without_events_says_so() -> None:
    run("tiny-1")
    assert printed(80) == "Nothing went wrong in run tiny-1 so far.\n"
    assert json.loads(events_as_json([])) == []


def test_json_is_all_that_is_recorded() -> None:
    folder, events = spiky_run()
    number, found = find_event(folder, "1")
    assert (number, found.outcome) == (1, outcome("recovered", 1173))
    shown = json.loads(event_as_json(number, found))
    assert shown.pop("number") == 1
    assert SpikeEvent.model_validate(shown) == found
    listed = json.loads(events_as_json(events))
    assert [(entry["number"], entry["id"]) for entry in listed] == [(n, e.id) for n, e in enumerate(events, 1)]


def test_an_event_is_named_by_its_number_or_its_id() -> None:
    folder, events = spiky_run()
    for number, event in enumerate(events, 1):
        for name in (str(number), event.id):
            found, same = find_event(folder, name)
            assert (found, same.id) == (number, event.id)


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        ("4", "it has 1 (loss-001123), 2 (worker_death-001200), 3 (non_finite-001300-t1)"),
        ("0", "it has 1 (loss-001123), 2 (worker_death-001200), 3 (non_finite-001300-t1)"),
        ("loss-001124", "did you mean loss-001123?"),
    ],
)
def test_an_unknown_event_is_answered_with_what_there_is(wanted: str, answer: str) -> None:
    folder, _ = spiky_run()
    with pytest.raises(UserError) as raised:
        find_event(folder, wanted)
    assert str(raised.value) == f"event {wanted}: run tiny-1 has no such event; {answer}"


def test_runs_are_listed_with_their_figures_the_newest_first() -> None:
    folder, _ = spiky_run()
    with SpoolWriter(folder.spool) as writer:
        for step in range(1, 101):
            writer.write(TRAIN, step, {"train/loss": 5 / step})
            if step % 50 == 0:
                writer.write(VALIDATION, step, {"val/loss": 2.0 + step / 1000, "moe/max_vio_global": step / 400})
        writer.rewind(94)
        writer.write(TRAIN, 95, {"train/loss": float("nan"), "train/grad_norm": 1.0})
    write_json(folder.ending, {"status": "FAILED"})
    run("older", f"{YEAR - 1}-05-01T12:00:00+00:00")
    run("trial", f"{YEAR}-05-03T12:00:00+00:00", parent="a-study")
    newest = run("newest", f"{YEAR}-05-02T12:00:00+00:00")
    lock = RunLock(newest)
    heading, _, *rows = lines_of(printed(120, "runs"))
    lock.release()
    assert heading == "run started status steps val loss MaxVio spikes steps lost diverged"
    # The validation after step 94 was taken back.
    for row, expected in zip(
        rows,
        (
            r"newest 05-02 \d\d:00 running 0 0 0 no",
            r"tiny-1 05-01 \d\d:00 failed 95 2\.0500 0\.125 2 7 yes",
            rf"older {YEAR - 1}-05-01 vanished 0 0 0 no",
        ),
        strict=True,
    ):
        assert re.fullmatch(expected, row)
    *_, row, count = lines_of(printed(120, "all"))
    assert row.startswith("tiny-1 ")
    assert count == "3 of 4 runs; --limit shows more."


def test_without_runs_the_list_says_where_it_looked() -> None:
    assert printed(200, "runs") == f"There are no runs in {runs_dir()} yet.\n"
    run("trial", parent="a-study")
    assert printed(200, "runs").endswith(" yet; 1 are trials of studies, sweeps and replays, which --all shows.\n")


@pytest.mark.parametrize("steps", [0, 1, 3000])
def test_the_newest_records_are_found_from_the_end_of_any_spool(tmp_path: Path, steps: int) -> None:
    spool = tmp_path / "metrics.jsonl"
    with SpoolWriter(spool) as writer:
        for step in range(1, steps + 1):
            if step == 2:
                writer.write(VALIDATION, step, {"val/loss": 1.5})
            writer.write(TRAIN, step, {"train/loss": 5 / step, "train/grad_norm": 1 / 3})
    with spool.open("ab") as file:
        file.write(b'{"kind":"train","step":99999,')
    found = newest_records(spool)
    assert {kind: found[kind].step for kind in found} == {
        **({TRAIN: steps} if steps else {}),
        **({VALIDATION: 2} if steps > 1 else {}),
    }
    if steps:
        assert found[TRAIN].metrics == {"train/loss": 5 / steps, "train/grad_norm": 1 / 3}
