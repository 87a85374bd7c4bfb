"""`droidspeak store ls` and `top`: the chunks of a store, one a row."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from droidspeak.integrations.cli.output import Format, FormatOption, show_rows
from droidspeak.integrations.cli.store.selecting import FilterArgument, FilterOption
from droidspeak.integrations.cli.store.showing import chunk_cells, chunk_columns, chunk_row
from droidspeak.integrations.cli.store.target import ConfigOption, StoreOption, Target, open_target
from droidspeak.storage.selection import Selection

__all__ = ["ls", "top"]

_MOST = 2**62


class Rank(StrEnum):
    """What makes a chunk stand at the top."""

    SIZE = "size"
    AGE = "age"
    HITS = "hits"


_ORDERS = {Rank.SIZE: "size:desc", Rank.AGE: "created", Rank.HITS: "hits:desc"}


def ls(
    more: FilterArgument = None,
    filter: FilterOption = None,
    sort: Annotated[
        str | None, typer.Option(metavar="KEY[:desc]", help="Order, such as size:desc; any if not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, max=_MOST, help="At most so many.")] = None,
    store: StoreOption = None,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """List chunks, as they are found: one row for each tier that holds one."""
    with open_target(store, config) as target:
        _list(target, target.selection([*(filter or []), *(more or [])], sort=sort, limit=limit), format)


def top(
    by: Annotated[Rank, typer.Option(help="The largest, the oldest, or the most used.")] = Rank.SIZE,
    limit: Annotated[int, typer.Option(min=1, max=_MOST, help="How many.")] = 20,
    filter: FilterOption = None,
    store: StoreOption = None,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """List the chunks that are largest, oldest or most used."""
    with open_target(store, config) as target:
        _list(target, target.selection(filter or [], sort=_ORDERS[by], limit=limit), format)


def _list(target: Target, selection: Selection, format: Format) -> None:
    names, found = target.names, target.select(selection)
    rows = map(chunk_cells, found) if format is Format.TABLE else (chunk_row(row, names) for row in found)
    show_rows(format, rows, chunk_columns(names), name="chunks")
