"""What the user is told when a run is over: how good it is, where it is, and how to look at it."""

from rich.console import Console
from rich.table import Table

from pipelines.description import parameters
from pipelines.history import History
from pipelines.progress import clock
from pipelines.run_folder import RunFolder
from pipelines.saved_view import View
from pipelines.tracking_store import run_link, server_command, view_link
from pipelines.views import TRAINING

# Metric, its name for people, and its format.
_ROWS = (
    ("train/loss", "training loss", "{:.4f} nats per token"),
    ("val/loss", "validation loss", "{:.4f} nats per token"),
    ("val/nats_per_byte", "", "{:.4f} nats per byte"),
    ("moe/max_vio_global", "MaxVio over validation", "{:.3f}"),
    ("moe/dead_experts", "dead experts", "{:.0f}"),
)


def print_summary(folder: RunFolder, seconds: float, console: Console | None = None) -> None:
    """Print the final table of a run, its folder, and the way to its page in the MLflow UI.

    ``seconds`` is how long the user has waited.
    """
    console = console or Console()
    info, history = folder.info, History.read(folder.spool)
    table = Table(title=f"Run {info.name}", title_justify="left", show_header=False, min_width=44)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, value in _rows(history, seconds):
        table.add_row(name, value)
    console.print()
    console.print(table)
    print_links(folder, TRAINING, console)


def print_links(folder: RunFolder, view: View, console: Console) -> None:
    """Print where a run's files are, and the way to its page and to the experiment's ``view`` in the MLflow UI."""
    info = folder.info
    _line(console, f"Files     {folder.path}")
    if command := server_command(info.tracking_uri):
        _line(console, f"Look at   {command}")
    _line(console, f"this run  {run_link(info.tracking_uri, info.experiment_id, info.id)}")
    _line(console, f"all runs  {view_link(info.tracking_uri, info.experiment_id, view)}")


def _rows(history: History, seconds: float) -> list[tuple[str, str]]:
    rows = []
    for metric, name, template in _ROWS:
        value = history.shown(metric)
        if value is not None:
            rows.append((name, template.format(value)))
    rows.append(("steps", f"{history.last_step:,}"))
    if (speed := history.tokens_per_second) is not None:
        rows.append(("speed", f"{speed:,.0f} tokens/s"))
    rows.append(("time", clock(seconds)))
    if counted := parameters(history):
        rows.append(("model", counted))
    return rows


def _line(console: Console, text: str) -> None:
    # Links and commands must survive being copied: no wrapping, no markup, no colours inside.
    console.print(text, soft_wrap=True, highlight=False, markup=False)
