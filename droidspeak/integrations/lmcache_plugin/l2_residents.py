"""The objects of an L2 adapter that are known to be in the store, with their sizes.

LMCache counts bytes per tenant from what its adapters tell it. Our store evicts on its own, other
processes write to it, and cache salts are not written down; so this table says what has been told, and
is compared with the store now and then.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

from lmcache.v1.distributed.api import ObjectKey

from droidspeak.integrations.lmcache_plugin.l2_objects import chunk_key
from droidspeak.storage import ChunkKey

__all__ = ["Residents"]


class Residents:
    """A thread-safe table of objects and their sizes in bytes."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._table: dict[ChunkKey, tuple[ObjectKey, int]] = {}

    def __len__(self) -> int:
        with self._mutex:
            return len(self._table)

    def add(self, key: ObjectKey, size: int) -> bool:
        """Notes `key`; whether it was not known."""
        chunk = chunk_key(key)
        with self._mutex:
            fresh = chunk not in self._table
            self._table.setdefault(chunk, (key, size))
        return fresh

    def remove(self, key: ObjectKey) -> int | None:
        """Forgets `key`; the size that was noted, `None` if it was not known."""
        with self._mutex:
            _, size = self._table.pop(chunk_key(key), (None, None))
        return size

    def named(self, key: ChunkKey) -> ObjectKey | None:
        """The object in the chunk `key`, if it is known."""
        with self._mutex:
            return self._table.get(key, (None, 0))[0]

    def chunks(self) -> dict[ChunkKey, ObjectKey]:
        """All that is known now."""
        with self._mutex:
            return {chunk: key for chunk, (key, _) in self._table.items()}

    def remove_all(self, keys: Collection[ObjectKey]) -> dict[ObjectKey, int]:
        """Forgets `keys`; the sizes of those that were known."""
        sizes = {key: self.remove(key) for key in keys}
        return {key: size for key, size in sizes.items() if size is not None}
