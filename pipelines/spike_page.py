"""One spike event for people: what happened, the layers, the gradient, the batch's text, and a picture."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.errors import UserError
from pipelines.loading import load_config
from pipelines.run_folder import RunFolder
from pipelines.spike_event import LayerState, SpikeEvent
from pipelines.spike_figure import draw_event
from pipelines.spike_text import SampleText, batch_text
from pipelines.spike_words import answer, counted, outcome, what
from pipelines.terminal import list_console, print_line

_SAMPLES_SHOWN = 8
_CHARACTERS_SHOWN = 240

# Field, heading, format.
_LAYER_COLUMNS = (
    ("max_vio", "MaxVio", "{:.3f}"),
    ("idle_experts", "idle experts", "{:d}"),
    ("bias_abs_max", "bias abs max", "{:.4g}"),
    ("router_logit_rms", "router logit RMS", "{:.4g}"),
    ("expert_max", "expert max", "{:.4g}"),
    ("expert_kurtosis", "expert kurtosis", "{:.4g}"),
    ("residual_rms", "residual RMS", "{:.4g}"),
    ("attention_logit_max", "attention logit max", "{:.4g}"),
)


def print_event(
    folder: RunFolder, number: int, event: SpikeEvent, full: bool = False, console: Console | None = None
) -> None:
    """Print all that is known of an event, and draw it.

    Args:
        folder: its run.
        number: of the event in the run's list, from 1.
        event: what is shown.
        full: show every sample's whole text rather than the beginnings of the first ones.
        console: where to.

    Raises:
        UserError: the picture cannot be written.
    """
    console = console or list_console()
    print_line(console, f"Event {number} of run {folder.info.name}: {event.id}")
    for name, words in _facts(event):
        print_line(console, f"  {name:<11} {words}")
    if event.layers:
        print_line(console, "MoE layers")
        console.print(_layers_table(event.layers))
    if event.grad_norms:
        print_line(console, "Gradient norms, before clipping")
        console.print(_norms_table(event))
    _print_batch(folder, event, full, console)
    print_line(console, f"Picture  {draw_event(folder, event)}")


def _facts(event: SpikeEvent) -> list[tuple[str, str]]:
    noticed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time_ms / 1000))
    tokens = f", after {event.tokens_seen:,} tokens" if event.tokens_seen is not None else ""
    facts = [("what", what(event)), ("when", noticed + tokens)]
    if event.threshold is not None:
        facts.append(("threshold", f"an event from a score of {event.threshold:g} on"))
    if event.onset is not None and event.onset != event.step:
        facts.append(("onset", f"conspicuous since step {event.onset:,}"))
    facts += [("answer", answer(event)), ("outcome", outcome(event))]
    if event.timeline:
        facts.append(("timeline", f"training had gone back {counted(event.timeline, 'time')} before"))
    if event.checkpoint is not None:
        facts.append(("checkpoint", f"{event.checkpoint}, kept for a replay"))
    if event.detail:
        facts.append(("detail", event.detail))
    return facts


def _layers_table(layers: Sequence[LayerState]) -> Table:
    """A row a layer; what no layer has measured is left out."""
    columns = [c for c in _LAYER_COLUMNS if any(getattr(layer, c[0]) is not None for layer in layers)]
    table = Table()
    for heading in ("layer", *(heading for _, heading, _ in columns)):
        table.add_column(heading, justify="right")
    for layer in layers:
        values = [(getattr(layer, name), template) for name, _, template in columns]
        table.add_row(str(layer.layer), *("" if v is None else template.format(v) for v, template in values))
    return table


def _norms_table(event: SpikeEvent) -> Table:
    table = Table()
    table.add_column("parameters")
    table.add_column("norm", justify="right")
    for group, norm in event.grad_norms.items():
        table.add_row(escape(group), "not finite" if norm is None else f"{norm:.4g}")
    return table


def _print_batch(folder: RunFolder, event: SpikeEvent, full: bool, console: Console) -> None:
    if not event.samples:
        return
    samples, documents = counted(len(event.samples), "sample"), counted(len(event.documents), "document")
    print_line(console, f"Batch: {samples} of {documents}")
    try:
        texts = batch_text(folder, event, load_config([str(folder.config)]).data)
    except UserError as error:
        # The rest is worth showing without.
        print_line(console, f"  its text cannot be shown: {error}")
        for name in event.documents:
            print_line(console, f"  {_printable(name)}")
        return
    shown = texts if full else texts[:_SAMPLES_SHOWN]
    for text in shown:
        _print_sample(text, full, console)
    if len(shown) < len(texts):
        print_line(console, f"  and {counted(len(texts) - len(shown), 'more sample')}; --full shows everything")


def _print_sample(text: SampleText, full: bool, console: Console) -> None:
    spans = "; ".join(f"{span.name}, tokens {span.start:,} to {span.end:,}" for span in text.documents)
    print_line(console, f"  sample {text.sample}: {_printable(spans)}")
    if full:
        for line in text.text.split("\n"):
            print_line(console, f"    | {_printable(line)}")
        return
    clipped = text.text[:_CHARACTERS_SHOWN]
    more = f" ... {len(text.text) - len(clipped):,} characters more" if len(clipped) < len(text.text) else ""
    # On one line, and with every space: what a batch is odd for may be its white space.
    print_line(console, f"    {_printable(clipped.replace(chr(10), '⏎'))}{more}")


def _printable(text: str) -> str:
    """Text from anywhere must not reach a terminal as commands to it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
