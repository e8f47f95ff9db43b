"""``steadymoe compare``: a report on runs side by side, in a file and in MLflow."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.command_line import EXIT_DONE, run_command
from pipelines.config import TrackingConfig
from pipelines.errors import UserError
from pipelines.home import comparisons_dir, refuse_unwritable_home
from pipelines.job import run_in_job
from pipelines.orphans import end_orphaned_parents
from pipelines.run_folder import RunFolder, write_whole
from pipelines.summary import print_links
from pipelines.terminal import list_console, print_line
from pipelines.tracking_store import artifact_link, open_store, store_errors, tracking_uri
from pipelines.views import TRAINING
from tuning import commands
from tuning.arguments import CompareArguments
from tuning.comparison.caveats import caveats
from tuning.comparison.comparing import Comparison, compare_runs
from tuning.comparison.findings import findings, headline
from tuning.comparison.page import PAGE, REPORT, write_report
from tuning.comparison.table import configurations_sheet
from tuning.comparison.tracked import ComparisonRun
from tuning.sweep_loading import load_sweep
from tuning.sweep_outcome import compare_trials

_NAMED = 3
# More are told in lines: cells would be cut to a letter.
_KEYS_IN_TABLE = 8
_LINES = 10


def run(folders: Sequence[RunFolder], out: Path | None) -> int:
    """One comparison; returns the exit code.

    Args:
        folders: of the runs.
        out: a file that gets the page as well.

    Raises:
        UserError: a run cannot be compared, or the tracking store does not take the report; it is on the disk then.
    """
    console = list_console()
    refuse_unwritable_home()
    comparison = compare_runs(folders, _title(folders))
    _print(comparison, console)
    try:
        # Not in the background: plotly looks at pandas, which MLflow would be importing at that moment.
        store = open_store(tracking_uri(TrackingConfig(), folders[0].info))
        end_orphaned_parents(store)
        parent = ComparisonRun.begin(comparison, store)
    except UserError as error:
        kept = write_report(comparison, out or comparisons_dir() / "untracked" / PAGE)
        raise UserError(f"{error} (so the report is not in MLflow; it is {kept})") from error
    with parent:
        page = write_report(comparison, parent.folder.figures / PAGE)
    if out is not None:
        write_whole(out, page.read_text(encoding="utf-8"))
    _say_where(parent.folder, out or page, console)
    if parent.undelivered:
        print_line(console, parent.undelivered)
    return EXIT_DONE


def compare_sweep(sweep: RunFolder, out: Path | None) -> int:
    """The trials of a sweep; the report takes the place of that which the sweep has left.

    Args:
        sweep: the sweep.
        out: a file that gets the page as well.

    Raises:
        UserError: fewer than two of its trials are over, or the tracking store does not take the report.
    """
    console = list_console()
    refuse_unwritable_home()
    comparison = compare_trials(load_sweep(str(sweep.config)), sweep)
    _print(comparison, console)
    page = write_report(comparison, sweep.figures / PAGE)
    if out is not None:
        write_whole(out, page.read_text(encoding="utf-8"))
    info = sweep.info
    store = open_store(tracking_uri(TrackingConfig(), info))
    with store_errors(store.uri):
        for file in (page, page.with_name(REPORT)):
            store.client.log_artifact(info.id, str(file), sweep.figures.name)
    _say_where(sweep, out or page, console)
    return EXIT_DONE


def _say_where(parent: RunFolder, page: Path, console: Console) -> None:
    info = parent.info
    print_line(console, f"Report    {page}")
    link = artifact_link(info.tracking_uri, info.experiment_id, info.id, f"{parent.figures.name}/{PAGE}")
    print_line(console, f"in MLflow {link}")
    print_links(parent, TRAINING, console)


def _title(folders: Sequence[RunFolder]) -> str:
    names = list(dict.fromkeys(folder.info.name for folder in folders))
    return (
        f"{', '.join(names[:-1])} and {names[-1]}" if 1 < len(names) <= _NAMED else f"Comparison of {len(names)} runs"
    )


def _print(comparison: Comparison, console: Console) -> None:
    """Table, headline, findings, caveats."""
    sheet = configurations_sheet(comparison)
    in_lines = len(comparison.keys) > _KEYS_IN_TABLE
    columns = [n for n, heading in enumerate(sheet.headings) if not (in_lines and heading in comparison.keys)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for n in columns:
        heading = sheet.headings[n]
        table.add_column(comparison.short.get(heading, heading), justify="left" if n == 0 else "right")
    for row in sheet.texts:
        table.add_row(*(escape(row[n]) for n in columns))
    console.print(table)
    for each in comparison.configurations[:_LINES]:
        number, _, values = each.name.partition(" ")
        names = ", ".join(run.info.name for run in each.runs)
        print_line(console, f"{number} is {names}{f': {values}' if in_lines else ''}")
    if (more := len(comparison.configurations) - _LINES) > 0:
        print_line(console, f"and {more} more, in the report")
    print_line(console, headline(comparison))
    for sentence in findings(comparison):
        print_line(console, f"- {sentence}")
    if found := caveats(comparison):
        print_line(console, "What is not comparable:")
        for sentence in found:
            print_line(console, f"- {sentence}")
    print_line(console, "")


def main(argv: Sequence[str] | None = None) -> int:
    """The command without the rest of the command line."""
    return run_command(CompareArguments, commands.compare, argv, "python -m tuning.compare")


if __name__ == "__main__":
    sys.exit(run_in_job(main))
