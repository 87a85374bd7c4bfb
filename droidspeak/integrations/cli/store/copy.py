"""`droidspeak store copy`: from one store to another."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from droidspeak.errors import UsageError
from droidspeak.integrations.cli.output import Format, FormatOption, note
from droidspeak.integrations.cli.store.bytebar import byte_bar
from droidspeak.integrations.cli.store.copying import Outcome
from droidspeak.integrations.cli.store.selecting import FilterOption
from droidspeak.integrations.cli.store.showing import size_text
from droidspeak.integrations.cli.store.target import ConfigOption, open_target
from droidspeak.storage.chunklist import ChunkList
from droidspeak.storage.tier import Tier
from droidspeak.storage.transfer import CopyOptions, copy_chunks
from droidspeak.storage.urls import parse_size

__all__ = ["copy"]


def copy(
    source: Annotated[str, typer.Argument(metavar="SRC", help="URL of the store to copy from.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="URL of the store to copy to.")],
    filter: FilterOption = None,
    transfers: Annotated[int, typer.Option(min=1, max=64, help="Chunks at a time.")] = 4,
    bwlimit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes a second at most, such as 100MiB.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be copied.")] = False,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Copy chunks, checked on both sides. What DST holds already is passed over: a copy that was broken off
    goes on with the same command. Pins are not copied."""
    options = CopyOptions(transfers, _bandwidth(bwlimit), dry_run)
    outcome = Outcome()
    with ExitStack() as stack:
        here = stack.enter_context(open_target([source], config))
        chunks = stack.enter_context(ChunkList(here.tiers.values(), here.selection(filter or [])))
        there = stack.enter_context(open_target([target], config, change=not dry_run, create=not dry_run))
        (tier,), nbytes = there.tiers.values(), chunks.nbytes
        _warn(tier, nbytes)
        title = "Would be copied" if dry_run else "Copied"
        shown = outcome.shown(format, title, source=source, target=target, dry_run=dry_run)
        with shown, byte_bar("Copying", nbytes) as moved:
            outcome.take(copy_chunks(chunks, tier, options), moved)
    outcome.require_all()


def _bandwidth(text: str | None) -> int | None:
    bandwidth = None if text is None else parse_size(text)
    if bandwidth == 0:
        raise UsageError("--bwlimit 0: allowed are sizes above 0")
    return bandwidth


def _warn(target: Tier, nbytes: int) -> None:
    usage = target.usage()
    if usage.capacity is not None and usage.nbytes + nbytes > usage.capacity:
        note(
            f"warning: {size_text(nbytes)} to copy; {target.name} holds {size_text(usage.nbytes)} of"
            f" {size_text(usage.capacity)}, so older chunks may leave"
        )
