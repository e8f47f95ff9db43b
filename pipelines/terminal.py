"""Where lists are printed: in a terminal as wide as it is, elsewhere so wide that no cell is broken."""

import sys

from rich.console import Console

_WIDTH_OF_A_FILE = 160


def list_console() -> Console:
    """A console on the standard output."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)


def print_line(console: Console, text: str) -> None:
    """Print a line as it is: not wrapped, nothing in it taken for markup, no colours inside."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)
