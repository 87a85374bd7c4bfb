"""Where the command line writes: results to standard output, notes and progress to standard error.

Results are either one document (`show_document`) or rows that may be many (`show_rows`), each in the
format that was asked for. JSON and JSONL carry `version`s and raw values (bytes, seconds, full keys), which
`docs/cli-json.md` describes; the table is for people and may change.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = [
    "Column",
    "Format",
    "FormatOption",
    "ReaderGone",
    "note",
    "progress",
    "show_document",
    "show_json",
    "show_rows",
    "show_table",
]

# Rows that are looked at before the widths of a streamed table are settled, and the seconds for that.
_SAMPLE = 500
_SAMPLE_SECONDS = 0.1


class Format(StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"
    QUIET = "quiet"


FormatOption = Annotated[
    Format,
    typer.Option(
        "--format",
        help="table for people; json and jsonl for programs; quiet for the bare names, if any.",
    ),
]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: of the row's value.
        title: above the column.
        show: the value as people read it; `None` is shown as `-`.
        right: figures stand at the right.
    """

    key: str
    title: str
    show: Callable[[Any], str] = str
    right: bool = False

    def text(self, row: Mapping[str, Any]) -> str:
        """The cell of `row`."""
        value = row.get(self.key)
        return "-" if value is None else self.show(value)


class ReaderGone(Exception):
    """Whoever read the results has seen enough (`| head`). typer would call a broken pipe a failure."""


@contextmanager
def _reader() -> Iterator[None]:
    """Inside, results are printed; at the end they have arrived. Raises `ReaderGone`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderGone from None


def note(text: str) -> None:
    """One line for people, on standard error."""
    print(text, file=sys.stderr, flush=True)


def progress(*, remaining: bool = False) -> Progress:
    """Progress bars on standard error, with the time left if asked; nothing where that is no terminal."""
    # Imported where it is used: a streamed listing prints its first row sooner than rich is there.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

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


def show_document(format: Format, content: Mapping[str, Any], table: Callable[[], None]) -> None:
    """One result: JSON of `content`, on one line for `jsonl`; what `table` prints; nothing for `quiet`."""
    with _reader():
        if format is Format.JSON:
            show_json(content)
        elif format is Format.JSONL:
            print(json.dumps(content))
        elif format is Format.TABLE:
            table()


def show_rows(
    format: Format,
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[Column],
    *,
    name: str,
    quiet: str = "key",
) -> int:
    """Rows as they come; none is kept.

    Args:
        rows: JSON and JSONL show all of a row, a table its `columns`, `quiet` the value at that key.
        name: of the list in the JSON document `{"version": 1, name: [...]}`.

    Returns:
        How many there were.
    """
    counted = _Counted(rows)
    with _reader():
        for number, line in enumerate(_LINES[format](counted, columns, name, quiet)):
            print(line, flush=number == 0)
    return counted.count


class _Counted:
    """An iterable that knows how many have come."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows = rows
        self.count = 0

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for row in self._rows:
            self.count += 1
            yield row


def _table_lines(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[Column], _name: str, _quiet: str
) -> Iterator[str]:
    rest = iter(rows)
    sample = [[column.text(row) for column in columns] for row in _first(rest)]
    titles = [column.title for column in columns]
    widths = [max(map(len, cells)) for cells in zip(titles, *sample, strict=True)]
    if sample:
        yield _line(titles, columns, widths)
    for cells in chain(sample, ([column.text(row) for column in columns] for row in rest)):
        yield _line(cells, columns, widths)


def _first(rows: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """A sample of the rows: as many as come within a moment."""
    end = time.monotonic() + _SAMPLE_SECONDS
    for count, row in enumerate(rows, 1):
        yield row
        if count >= _SAMPLE or time.monotonic() > end:
            return


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    padded = (
        cell.rjust(width) if column.right else cell.ljust(width)
        for cell, column, width in zip(cells, columns, widths, strict=True)
    )
    return "  ".join(padded).rstrip()


def _json_lines(
    rows: Iterable[Mapping[str, Any]], _columns: Sequence[Column], name: str, _quiet: str
) -> Iterator[str]:
    yield f'{{"version": 1, {json.dumps(name)}: ['
    held = ""
    for row in rows:
        if held:
            yield held + ","
        held = "  " + json.dumps(row)
    if held:
        yield held
    yield "]}"


def _jsonl_lines(
    rows: Iterable[Mapping[str, Any]], _columns: Sequence[Column], _name: str, _quiet: str
) -> Iterator[str]:
    return (json.dumps(row) for row in rows)


def _quiet_lines(
    rows: Iterable[Mapping[str, Any]], _columns: Sequence[Column], _name: str, quiet: str
) -> Iterator[str]:
    return (str(row[quiet]) for row in rows)


_LINES = {
    Format.TABLE: _table_lines,
    Format.JSON: _json_lines,
    Format.JSONL: _jsonl_lines,
    Format.QUIET: _quiet_lines,
}


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on standard output; the first column is text, the others are figures."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n == 0 else "right", overflow="fold")
    for row in rows:
        # Names may hold brackets, which are not markup.
        table.add_row(*map(Text, row))
    console = Console()
    # A pipe has no width of its own; a folded table is of no use to grep.
    console = Console(width=None if console.is_terminal else 160)
    with console.capture() as printed:
        console.print(table)
    # Not by rich itself, which takes a reader that is gone for a failure.
    print(printed.get(), end="")


def show_json(content: Any) -> None:
    """JSON on standard output."""
    print(json.dumps(content, indent=2))
