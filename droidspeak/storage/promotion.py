"""Promotion: what a slower tier gave is copied into the faster ones, in the background.

Promotion only saves time later, so it never waits for room: what finds a queue full is forgotten. A
chunk is promoted in a turn of its own, and only if its key has not changed since before it was read:
it can neither undo a write nor bring back what was deleted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from droidspeak.errors import StorageError
from droidspeak.storage.backlog import Backlog
from droidspeak.storage.changes import Changes
from droidspeak.storage.container import Chunk
from droidspeak.storage.counters import Counters
from droidspeak.storage.level import Level
from droidspeak.storage.tier import ChunkInfo

__all__ = ["Promoter"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Offer:
    """A chunk seen in a level. `chunk` is `None` if it is not here as a whole."""

    info: ChunkInfo
    level: int
    stamp: int
    chunk: Chunk | None


class Promoter:
    """Promotes among `levels`, from fast to slow.

    Args:
        capacity: bytes of the chunks that may wait to be promoted.
    """

    def __init__(
        self, levels: Sequence[Level], changes: Changes, counters: Counters, capacity: int = 1 << 30
    ) -> None:
        self._levels, self._changes, self._counters = levels, changes, counters
        self._backlog: Backlog[_Offer] = Backlog(self._promote, capacity, "droidspeak promote")

    def offer(self, level: int, chunk: Chunk, stamp: int, *, owned: bool) -> None:
        """Notes a hit of `levels[level]`.

        Args:
            stamp: of the key, from before the read.
            owned: somebody else may change the memory of `chunk`; it will be read again.
        """
        whole = None if owned or not chunk.complete else chunk
        offer = _Offer(ChunkInfo.of(chunk), level, stamp, whole)
        if self._backlog.get(chunk.key) is None:
            self._backlog.add(chunk.key, offer, offer.info.nbytes, timeout=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks that wait to be promoted."""
        return self._backlog.nbytes

    def flush(self, timeout: float) -> bool:
        """Waits until all that was offered is promoted; whether that came within `timeout` s."""
        return self._backlog.flush(timeout)

    def close(self, timeout: float) -> None:
        """Forgets what waits, and waits for the promotion under way, for `timeout` s at most."""
        self._backlog.clear()
        self._backlog.close(timeout)

    def _promote(self, offer: _Offer) -> None:
        targets = [level for level in self._levels[: offer.level] if _lacks(level, offer.info)]
        if not targets:
            return
        try:
            chunk = offer.chunk or self._levels[offer.level].read(offer.info.key)
        except StorageError as error:
            _log.debug("chunk %s not promoted: %s", offer.info.key, error)
            return
        if chunk is None:
            return
        with self._changes.turn(offer.info.key):
            if self._changes.stamp(offer.info.key) == offer.stamp:
                for level in targets:
                    self._store(level, chunk)

    def _store(self, level: Level, chunk: Chunk) -> None:
        try:
            level.write(chunk, timeout=0)
        except StorageError as error:
            _log.debug("chunk %s not promoted to tier %s: %s", chunk.key, level.name, error)
        else:
            self._counters.add("promotions", level.name)


def _lacks(level: Level, info: ChunkInfo) -> bool:
    try:
        return level.head(info.key) != info
    except StorageError:
        return False
