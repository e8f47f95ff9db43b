import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.notes import Note, add_note
from pipelines.progress import RunProgress, clock
from pipelines.run_folder import RunFolder
from pipelines.spool import START, TRAIN, VALIDATION, Record

Write = Callable[..., None]


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def write(spool: Path) -> Write:
    def append(kind: str, step: int, seconds: float, **metrics: float) -> None:
        named = {name.replace("__", "/"): value for name, value in metrics.items()}
        finite = {name: value for name, value in named.items() if math.isfinite(value)}
        lost = tuple(name for name in named if name not in finite)
        with spool.open("ab") as file:
            file.write(Record(kind, step, round(seconds * 1000), finite, lost).to_line())

    return append


def shown_lines(spool: Path, steps: int, fill: Callable[[RunProgress], None]) -> list[str]:
    output = io.StringIO()
    with RunProgress(RunFolder(spool.parent), steps, Console(file=output, width=40)) as progress:
        fill(progress)
    assert "\r" not in output.getvalue()
    assert "\x1b" not in output.getvalue()
    return output.getvalue().splitlines()


def test_a_file_gets_plain_lines_with_every_figure(spool: Path, write: Write) -> None:
    def fill(progress: RunProgress) -> None:
        progress.phase("starting 2 Ray workers")
        write(START, 0, 1)
        for step in range(1, 11):
            write(TRAIN, step, 10 + step, train__loss=5 - step / 10, train__grad_norm=0.5, moe__max_vio_batch=0.25,
                  train__tokens_per_second=10 if step <= 3 else 12_000)  # fmt: skip
        write(VALIDATION, 10, 21, val__loss=3.5)

    first, *_, last = lines = shown_lines(spool, 200, fill)
    assert first == "starting 2 Ray workers ..."
    assert lines[1] == "step   1/200  loss 4.900  grad 0.50  MaxVio 0.25"
    # 190 steps at the pace of steps 3 to 10 and the validation after them: (21 - 13) s / 7.
    eta = clock(190 * 8 / 7)
    assert last == f"step  10/200  loss 4.000  val 3.500  grad 0.50  MaxVio 0.25  12,000 tokens/s  ETA {eta}"


def test_lines_come_at_five_percent_but_never_in_a_hurry(spool: Path, write: Write) -> None:
    def steps_shown(total: int, seconds_per_step: float) -> list[int]:
        spool.unlink(missing_ok=True)

        def fill(progress: RunProgress) -> None:
            for step in range(1, total + 1):
                write(TRAIN, step, 1 + step * seconds_per_step, train__loss=1.0)

        return [int(line.split()[1].split("/")[0]) for line in shown_lines(spool, total, fill)]

    assert steps_shown(100, 1.0) == list(range(1, 101, 5))
    assert steps_shown(100, 0.1) == [1, 51]
    assert steps_shown(100, 70.0) == list(range(1, 101))


def test_a_resumed_run_shows_only_its_own_part(spool: Path, write: Write) -> None:
    write(TRAIN, 1, 1, train__loss=9.0)
    write(TRAIN, 2, 2, train__loss=8.0)
    lines = shown_lines(spool, 100, lambda _: write(TRAIN, 3, 500, train__loss=7.0))
    assert [line.split() for line in lines] == [["step", "3/100", "loss", "7.000"]]


def test_what_happened_beside_the_steps_is_said_once(spool: Path, write: Write) -> None:
    notes = RunFolder(spool.parent).notes
    add_note(notes, Note("resume", "of an earlier command"))

    def fill(progress: RunProgress) -> None:
        write(TRAIN, 1, 1, train__loss=2.0)
        add_note(notes, Note("death", "worker 1 died; starting again"))
        progress.poll()
        progress.poll()

    lines = shown_lines(spool, 100, fill)
    assert lines.count("worker 1 died; starting again") == 1
    assert "of an earlier command" not in lines


def test_a_loss_that_is_not_a_number_is_shown_as_such(spool: Path, write: Write) -> None:
    def fill(progress: RunProgress) -> None:
        write(TRAIN, 1, 1, train__loss=2.0)
        write(TRAIN, 2, 2, train__loss=math.nan)
        write(VALIDATION, 2, 2, val__loss=3.0)

    assert "loss nan" in shown_lines(spool, 100, fill)[-1]


def test_a_terminal_gets_a_bar(spool: Path, write: Write) -> None:
    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=True, color_system=None)
    with RunProgress(RunFolder(spool.parent), 50, console) as progress:
        progress.phase("starting 2 Ray workers")
        for step in range(1, 26):
            write(TRAIN, step, step, train__loss=2.25, train__tokens_per_second=1234)
        progress.poll()
    text = output.getvalue()
    assert "starting 2 Ray workers" in text
    assert "25/50" in text
    assert "loss 2.250" in text
    assert "1,234 tokens/s" in text
    assert "ETA 0:25" in text


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0:00"), (61, "1:01"), (59.7, "1:00"), (3723, "1:02:03")])
def test_durations_read_as_clocks(seconds: float, text: str) -> None:
    assert clock(seconds) == text
