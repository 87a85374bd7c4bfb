"""`droidspeak store export` and `import`: a store as one tar file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from droidspeak.storage.archive import Refused, export_chunks, import_chunks
from droidspeak.storage.chunklist import ChunkList
from droidspeak.storage.partial import keep_chunks, partial_file
from droidspeak.storage.transfer import Fate

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
    """Write chunks to one tar file, which any tar reads: SOURCE/SHARD/LINK.safetensors. It is FILE.partial
    until it is whole; the same command goes on with one that was broken off. Pins are not exported."""
    outcome = Outcome()
    with ExitStack() as stack:
        target = stack.enter_context(open_target(store, config))
        selection = target.selection(filter or [])
        archive = stack.enter_context(_made(file, force))
        chunks = stack.enter_context(ChunkList(target.tiers.values(), selection))
        moved = stack.enter_context(byte_bar("Exporting", chunks.nbytes))
        if file != _STREAM:
            _keep(archive, chunks, outcome, moved)
        outcome.take(export_chunks(chunks, archive), moved)
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


def _keep(archive: IO[bytes], chunks: ChunkList, outcome: Outcome, moved: Callable[[int], None]) -> None:
    """Takes over what an export that was broken off has left in `archive`."""
    if os.fstat(archive.fileno()).st_size:
        outcome.take(keep_chunks(archive, chunks), moved)
        count, kept = outcome.chunks[Fate.HELD], size_text(outcome.nbytes[Fate.HELD])
        note(f"{archive.name}: {count} chunk{'' if count == 1 else 's'}, {kept} are kept")


@contextmanager
def _made(file: str, force: bool) -> Iterator[IO[bytes]]:
    """What to write to; a file gets its name when all is written."""
    if file == _STREAM:
        if sys.stdout.isatty():
            raise UsageError("an archive is nothing for a terminal; name a file, or lead it elsewhere with |")
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    _require_free(file, force)
    try:
        with partial_file(Path(file)) as archive, _stays(archive):
            # Whoever had the lock may have made it.
            _require_free(file, force)
            yield archive
    except DroidSpeakError:
        raise
    except OSError as error:
        raise DroidSpeakError(f"{error.filename or file}: {error.strerror or error}") from error


@contextmanager
def _stays(archive: IO[bytes]) -> Iterator[None]:
    """Tells what is left when the export inside is broken off."""
    try:
        yield
    except UsageError:
        raise
    except BaseException:
        if os.fstat(archive.fileno()).st_size:
            note(f"{archive.name} stays: the same command goes on with it")
        raise


def _require_free(file: str, force: bool) -> None:
    if Path(file).exists() and not force:
        raise UsageError(f"{file} is there already; --force replaces it")


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
