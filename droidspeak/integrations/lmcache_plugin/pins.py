"""Pins in the store, counted: LMCache pins for each lookup, a tier only knows pinned and not pinned."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import suppress

from droidspeak.errors import StorageError
from droidspeak.storage import ChunkKey, TieredStore

__all__ = ["Pins"]


class Pins:
    """The pins of one engine."""

    def __init__(self, store: TieredStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._counts: Counter[ChunkKey] = Counter()

    def pin(self, key: ChunkKey, pins: int) -> bool:
        """Pins `key` `pins` times more; whether it is there."""
        with self._lock:
            if not self._counts[key] and not self._pinned(key):
                del self._counts[key]
                return False
            self._counts[key] += pins
            return True

    def unpin(self, key: ChunkKey, pins: int = 1) -> bool:
        """Takes pins back; whether `key` was pinned here."""
        with self._lock:
            if key not in self._counts:
                return False
            self._counts[key] -= pins
            if self._counts[key] <= 0:
                self._release(key)
            return True

    def clear(self) -> None:
        """Takes all pins back."""
        with self._lock:
            for key in list(self._counts):
                self._release(key)

    def __len__(self) -> int:
        return len(self._counts)

    def _pinned(self, key: ChunkKey) -> bool:
        try:
            return self._store.pin(key)
        except StorageError:
            return False

    def _release(self, key: ChunkKey) -> None:
        del self._counts[key]
        with suppress(StorageError):
            self._store.unpin(key)
