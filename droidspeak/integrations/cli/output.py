"""Where the command line writes: results to standard output, notes and progress to standard error."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

__all__ = ["Format", "note", "progress", "show_json", "show_table"]


class Format(StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"


def note(text: str) -> None:
    """One line for people, on standard error."""
    print(text, file=sys.stderr, flush=True)


def progress(*, remaining: bool = False) -> Progress:
    """Progress bars on standard error, with the time left if asked; nothing where that is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *([TextColumn("left"), TimeRemainingColumn()] if remaining else []),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on standard output; the first column is text, the others are figures."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n == 0 else "right", overflow="fold")
    for row in rows:
        # Names may hold brackets, which are not markup.
        table.add_row(*map(Text, row))
    console = Console()
    # A pipe has no width of its own; a folded table is of no use to grep.
    Console(width=None if console.is_terminal else 160).print(table)


def show_json(content: Any) -> None:
    """JSON on standard output."""
    print(json.dumps(content, indent=2))
