"""All runs with the figures that tell a stable one from others. Imports none of torch, ray and mlflow."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.home import runs_dir
from pipelines.run_folder import RunFolder, RunInfo, read_json, run_folders
from pipelines.run_lock import is_in_use
from pipelines.spike_event import read_events, steps_lost
from pipelines.spool import REWIND, TRAIN, VALIDATION, Record
from pipelines.terminal import list_console, print_line

_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class RunFigures:
    """What is known of a run by now."""

    info: RunInfo
    status: str
    """finished, failed or killed; running; vanished, if its driver ended without a word."""
    steps: int
    val_loss: float | None
    """Of the last validation, in nats per token; None if there was none, or it was not finite."""
    max_vio: float | None
    """Mean over the layers, of the load of the last validation."""
    spikes: int
    steps_lost: int
    diverged: bool
    """Whether loss or gradient norm were not finite when they were last measured."""


def print_runs(limit: int, trials: bool = False, console: Console | None = None) -> None:
    """Print the newest runs, the newest first.

    Args:
        limit: so many of them.
        trials: those of studies, too.
        console: where to.
    """
    console = console or list_console()
    found = [(folder.info, folder) for folder in run_folders()]
    chosen = sorted(
        (both for both in found if trials or both[0].parent is None),
        key=lambda both: (both[0].created, both[0].name),
        reverse=True,
    )
    if not chosen:
        hint = f"; {len(found):,} are trials of studies, sweeps and replays, which --all shows" if found else ""
        print_line(console, f"There are no runs in {runs_dir()} yet{hint}.")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    for heading in ("started", "status"):
        table.add_column(heading, no_wrap=True)
    for heading in ("steps", "val loss", "MaxVio", "spikes", "steps lost", "diverged"):
        table.add_column(heading, justify="right", no_wrap=heading != "steps lost")
    for _, folder in chosen[:limit]:
        table.add_row(*_cells(figures_of(folder)))
    console.print(table)
    if len(chosen) > limit:
        print_line(console, f"{limit} of {len(chosen):,} runs; --limit shows more.")


def _cells(run: RunFigures) -> list[str]:
    started = datetime.fromisoformat(run.info.created).astimezone()
    return [
        escape(run.info.name),
        f"{started:%m-%d %H:%M}" if started.year == datetime.now().year else f"{started:%Y-%m-%d}",
        run.status,
        f"{run.steps:,}",
        "" if run.val_loss is None else f"{run.val_loss:.4f}",
        "" if run.max_vio is None else f"{run.max_vio:.3f}",
        f"{run.spikes:,}",
        f"{run.steps_lost:,}",
        "yes" if run.diverged else "no",
    ]


def figures_of(folder: RunFolder) -> RunFigures:
    """What is known of a run by now."""
    events = read_events(folder.events)
    newest = newest_records(folder.spool)
    trained, validated = newest.get(TRAIN), newest.get(VALIDATION)
    lost = {name for record in newest.values() for name in record.non_finite}
    return RunFigures(
        info=folder.info,
        status=_status(folder),
        steps=trained.step if trained else 0,
        val_loss=validated.metrics.get("val/loss") if validated else None,
        max_vio=validated.metrics.get("moe/max_vio_global") if validated else None,
        spikes=sum(event.is_training for event in events),
        steps_lost=steps_lost(events),
        diverged=not lost.isdisjoint(("train/loss", "train/grad_norm", "val/loss")),
    )


def _status(folder: RunFolder) -> str:
    ending = read_json(folder.ending)
    if ending:
        return str(ending["status"]).lower()
    return "running" if is_in_use(folder) else "vanished"


def newest_records(spool: Path) -> dict[str, Record]:
    """The last training step and the last validation of a spool that were not taken back, by their kind.

    Read from the end: a long run's file takes a second as a whole.
    """
    newest: dict[str, Record] = {}
    rewound_to: int | None = None
    for line in _lines_from_the_end(spool):
        kind = next((k for k in (TRAIN, VALIDATION, REWIND) if line.startswith(f'{{"kind":"{k}"'.encode())), None)
        if kind is None or kind in newest:
            continue
        record = Record.from_line(line)
        if kind == REWIND:
            rewound_to = record.step if rewound_to is None else min(rewound_to, record.step)
        elif rewound_to is None or record.step <= rewound_to:
            newest[kind] = record
            if newest.keys() == {TRAIN, VALIDATION}:
                break
    return newest


def _lines_from_the_end(path: Path) -> Iterator[bytes]:
    """The lines of a file that are complete, the last first."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        end = file.seek(0, os.SEEK_END)
        rest: bytes | None = None
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            lines = file.read(end - start).split(b"\n")
            end = start
            # The first block's last piece is empty, or a line that is still being written.
            lines[-1] = b"" if rest is None else lines[-1] + rest
            rest = lines.pop(0)
            yield from (line for line in reversed(lines) if line)
        if rest:
            yield rest
