"""`droidspeak store export` and `import`: a store as one tar file."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated

import typer

from droidspeak.errors import DroidSpeakError, NotFound, UsageError
from droidspeak.integrations.cli.output import Format, FormatOption, note
from droidspeak.integrations.cli.store.bytebar import byte_bar
from droidspeak.integrations.cli.store.copying import Outcome
from droidspeak.integrations.cli.store.selecting import FilterOption
from droidspeak.integrations.cli.store.showing import size_text
from droidspeak.integrations.cli.store.target import ConfigOption, StoreOption, open_target
from droidspeak.storage.archive import Refused, Row, export_chunks, import_chunks
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.selection import Selection
from droidspeak.storage.tier import Tier
from droidspeak.storage.transfer import Fate, listed

__all__ = ["export", "import_"]

_STREAM = "-"


def export(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The archive to make; - for standard output.")],
    filter: FilterOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it is there.")] = False,
    store: StoreOption = None,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Write chunks to one tar file, which any tar reads: SOURCE/SHARD/LINK.safetensors. It appears when it is
    whole. Pins are not exported."""
    outcome = Outcome()
    with open_target(store, config) as target, _made(file, force) as archive:
        rows = list(_rows(target.tiers, target.selection(filter or [])))
        with byte_bar("Exporting", sum(nbytes for _, _, nbytes in rows)) as moved:
            outcome.take(export_chunks(rows, archive), moved)
    if file == _STREAM:
        note(f"{outcome.chunks[Fate.COPIED]} chunks, {size_text(outcome.nbytes[Fate.COPIED])} exported")
    else:
        outcome.show(format, "Exported", file=file)
    outcome.require_all()


def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The archive; - for standard input.")],
    store: StoreOption = None,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Read the chunks of an archive into the first tier of the store. Each is checked; what is held already
    is passed over, and what is no chunk is refused."""
    outcome = Outcome()
    with open_target(store, config, change=True, create=True) as target, _opened(file) as archive:
        tier = next(iter(target.tiers.values()))
        size = None if file == _STREAM else os.fstat(archive.fileno()).st_size
        shown = outcome.shown(format, "Imported", file=file, tier=tier.name)
        with shown, byte_bar("Importing", size) as moved:
            for told in import_chunks(archive, tier):
                if isinstance(told, Refused):
                    outcome.fail(None, f"refused: {told}")
                else:
                    outcome.add(told)
                    moved(told.nbytes)
    outcome.require_all()


def _rows(tiers: Mapping[str, Tier], selection: Selection) -> Iterator[Row]:
    """Each chunk once, of the first tier that has it."""
    seen: set[ChunkKey] = set()
    for tier in tiers.values():
        for key, nbytes in listed(tier, selection):
            if key not in seen:
                seen.add(key)
                yield tier, key, nbytes


@contextmanager
def _made(file: str, force: bool) -> Iterator[IO[bytes]]:
    """What to write to; a file gets its name when all is written."""
    if file == _STREAM:
        if sys.stdout.isatty():
            raise UsageError("an archive is nothing for a terminal; name a file, or lead it elsewhere with |")
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(file)
    if path.exists() and not force:
        raise UsageError(f"{file} is there already; --force replaces it")
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temp.open("xb") as archive:
            yield archive
        temp.replace(path)
    except OSError as error:
        raise DroidSpeakError(f"{file}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temp.unlink(missing_ok=True)


@contextmanager
def _opened(file: str) -> Iterator[IO[bytes]]:
    if file == _STREAM:
        if sys.stdin.isatty():
            raise UsageError("an archive is nothing to type; name a file, or lead it here with |")
        yield sys.stdin.buffer
        return
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(Path(file).open("rb"))
        except FileNotFoundError:
            raise NotFound(f"no file {file}") from None
        except OSError as error:
            raise UsageError(f"{file}: {error.strerror}") from None
        yield archive
