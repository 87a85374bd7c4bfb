"""Locks of LMCache's L2 interface, as pins of our store.

LMCache locks what it has found until it has loaded it, once per request; the store pins a chunk or
does not. So the first lock pins, the last unlock unpins, and what could not be unpinned is tried again
at every later chance. `release_all` lets go of everything that a closing adapter still holds.
"""

from __future__ import annotations

import threading

from droidspeak.errors import StorageError
from droidspeak.storage import ChunkKey, Tier
from droidspeak.storage.changes import Changes

__all__ = ["Locks"]


class Locks:
    """Counted locks over the pins of `store`."""

    def __init__(self, store: Tier) -> None:
        self._store = store
        self._turns = Changes()
        self._mutex = threading.Lock()
        self._counts: dict[ChunkKey, int] = {}
        self._owed: set[ChunkKey] = set()

    def __len__(self) -> int:
        """Chunks that are locked."""
        with self._mutex:
            return len(self._counts)

    def __contains__(self, key: ChunkKey) -> bool:
        with self._mutex:
            return key in self._counts

    def lock(self, key: ChunkKey) -> bool:
        """Locks `key` once more; whether it is there.

        Raises:
            StorageError: the store cannot say; nothing is locked.
        """
        with self._turns.turn(key):
            if key not in self and not self._store.pin(key):
                return False
            with self._mutex:
                self._owed.discard(key)
                self._counts[key] = self._counts.get(key, 0) + 1
            return True

    def unlock(self, key: ChunkKey) -> None:
        """Takes one lock of `key` away; one that was never locked is left as it is."""
        with self._turns.turn(key):
            with self._mutex:
                count = self._counts.pop(key, 0)
                if count > 1:
                    self._counts[key] = count - 1
                if count == 1:
                    self._owed.add(key)
            self._unpin(key)
        self._settle()

    def release_all(self) -> None:
        """Unpins everything that is locked."""
        with self._mutex:
            self._owed.update(self._counts)
            self._counts.clear()
        self._settle()

    def _settle(self) -> None:
        with self._mutex:
            owed = list(self._owed)
        for key in owed:
            with self._turns.turn(key):
                self._unpin(key)

    def _unpin(self, key: ChunkKey) -> None:
        with self._mutex:
            if key not in self._owed:
                return
        try:
            self._store.unpin(key)
        except StorageError:
            return
        with self._mutex:
            self._owed.discard(key)
