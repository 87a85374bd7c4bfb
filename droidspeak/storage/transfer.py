"""Copying chunks from one tier to another: checked, several at a time, and resumable.

    list      what the source holds (`droidspeak.storage.chunklist`)
    compare   what the destination holds already: the same size and the same header digest, which covers the
              checksums of all slots, is the same chunk
    read      from the source, each slot checked
    write     to the destination, all or nothing
    confirm   the destination's own word for size and shape

Nothing else is remembered: whoever starts a copy again that was broken off goes on where it stood.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from enum import StrEnum

from droidspeak.errors import ChunkCorrupt
from droidspeak.storage.chunklist import Row
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.spread import spread
from droidspeak.storage.tier import ChunkInfo, Tier

__all__ = ["Copied", "CopyOptions", "Fate", "Pace", "copy_chunks", "holds_same"]


class Fate(StrEnum):
    """What became of a chunk: `gone` left the source meanwhile, `failed` could not be copied."""

    COPIED = "copied"
    HELD = "held"
    GONE = "gone"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Copied:
    """One chunk's fate; `detail` says in one line why it failed."""

    key: ChunkKey
    nbytes: int
    fate: Fate
    detail: str = ""


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """How to copy.

    Attributes:
        transfers: chunks at a time.
        bandwidth: bytes a second at most, over all transfers; `None` sets no bound.
        dry_run: only say what would be copied.
    """

    transfers: int = 4
    bandwidth: int | None = None
    dry_run: bool = False


class Pace:
    """Keeps threads that share it to so many bytes a second; `None` for no bound."""

    def __init__(self, bandwidth: int | None) -> None:
        self._bandwidth = bandwidth
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._free_at = 0.0

    def wait(self, nbytes: int) -> bool:
        """Waits for its turn to move `nbytes`; whether to go on."""
        if self._bandwidth:
            with self._lock:
                start = max(time.monotonic(), self._free_at)
                self._free_at = start + nbytes / self._bandwidth
            self._stopped.wait(max(0.0, start - time.monotonic()))
        return not self._stopped.is_set()

    def stop(self) -> None:
        """Nobody waits any longer."""
        self._stopped.set()


def copy_chunks(rows: Iterable[Row], target: Tier, options: CopyOptions) -> Generator[Copied, None, None]:
    """Copies the chunks of `rows` (see `ChunkList`), and tells the fate of each. Pins are not copied.

    Whoever stops early waits for the chunks that are under way: none is left half written.

    Raises:
        TierUnavailable, TierTimeout, TierFull: a side does not answer, or is full; all that was copied until
            then is there.
    """
    pace = Pace(options.bandwidth)

    return spread(lambda row: _copy(row, target, pace, options.dry_run), rows, options.transfers, pace.stop)


def _copy(row: Row, target: Tier, pace: Pace, dry_run: bool) -> Copied:
    source, key, nbytes = row
    try:
        held = target.head(key)
        if held and holds_same(target, held, lambda: _digest(source, key)):
            return Copied(key, nbytes, Fate.HELD)
        if dry_run:
            return Copied(key, nbytes, Fate.COPIED)
        if not pace.wait(nbytes):
            return Copied(key, nbytes, Fate.FAILED, "stopped")
        chunk = source.read(key)
        if chunk is None:
            return Copied(key, nbytes, Fate.GONE)
        target.write(chunk.verify())
        fault = _fault(target.head(key), ChunkInfo.of(chunk))
        return Copied(key, chunk.header.nbytes, Fate.FAILED if fault else Fate.COPIED, fault)
    except ChunkCorrupt as error:
        return Copied(key, nbytes, Fate.FAILED, str(error))


def holds_same(target: Tier, held: ChunkInfo, digest: Callable[[], str | None]) -> bool:
    """Whether the chunk that `target` holds has a header of this `digest`."""
    try:
        chunk = target.read(held.key, [])
    except ChunkCorrupt:
        return False
    return chunk is not None and chunk.header.digest == digest()


def _digest(source: Tier, key: ChunkKey) -> str | None:
    chunk = source.read(key, [])
    return chunk.header.digest if chunk else None


def _fault(found: ChunkInfo | None, wanted: ChunkInfo) -> str:
    if found is None:
        return "written, and not there: evicted at once, or never kept"
    same = (found.nbytes, found.tokens, found.e_layers) == (wanted.nbytes, wanted.tokens, wanted.e_layers)
    return "" if same else f"{found.nbytes} bytes are there instead of {wanted.nbytes}"
