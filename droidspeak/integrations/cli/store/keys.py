"""Keys on the command line: whole, or as much of a link as names one chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from droidspeak.errors import NotFound
from droidspeak.integrations.cli.output import Column, Format, show_rows
from droidspeak.integrations.cli.store.target import Target
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.tier import Tier

__all__ = ["KeysArgument", "change_each"]

KeysArgument = Annotated[
    list[str], typer.Argument(metavar="KEY...", help="SOURCE/SHARD/LINK, or the first digits of a link.")
]
_COLUMNS = [Column("key", "key"), Column("tiers", "tiers", ", ".join)]


def change_each(
    target: Target, texts: Sequence[str], change: Callable[[Tier, ChunkKey], bool], format: Format
) -> None:
    """Makes a change to each chunk in each tier that holds it, and shows those that were there.

    Raises:
        UsageError: one of `texts` is no key, or the beginning of several; nothing was changed.
        NotFound: some are not there; the others were changed.
    """
    missing: list[str] = []
    keys = [key for text in texts if (key := _find(target, text, missing))]
    rows: list[dict[str, Any]] = []
    for key in dict.fromkeys(keys):
        tiers = [name for name, tier in target.tiers.items() if change(tier, key)]
        if tiers:
            rows.append({"key": str(key), "tiers": tiers})
        else:
            missing.append(str(key))
    show_rows(format, rows, _COLUMNS, name="chunks")
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise NotFound(f"not there: {shown}")


def _find(target: Target, text: str, missing: list[str]) -> ChunkKey | None:
    if text.count("/") == 2:
        return ChunkKey.parse(text)
    try:
        return target.find(text)
    except NotFound:
        missing.append(text)
        return None
