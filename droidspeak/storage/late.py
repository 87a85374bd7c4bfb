"""A tier that cannot be opened yet: a folder that is not mounted, not writable, or on a full disk.

A process must come up and answer without its cache. Each call tries to open the tier and raises
`TierUnavailable` until that works; the guard in front of it keeps the tries far between.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch

from droidspeak.errors import TierUnavailable
from droidspeak.storage.container import Chunk, Slot
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.tier import ChunkInfo, Tier, TierUsage

__all__ = ["LateTier"]


class LateTier(Tier):
    """Opens a tier at the first call for which that works, and is that tier from then on.

    Args:
        open_tier: opens it; raises `TierUnavailable` while it cannot.
    """

    def __init__(self, open_tier: Callable[[], Tier], name: str) -> None:
        self.name = name
        self._open = open_tier
        self._lock = threading.Lock()
        self._tier: Tier | None = None
        self._closed = False

    @property
    def opened(self) -> Tier:
        """The tier itself. Raises `TierUnavailable` if it still cannot be opened."""
        with self._lock:
            if self._closed:
                raise TierUnavailable(f"tier {self.name} is closed")
            if self._tier is None:
                self._tier = self._open()
            return self._tier

    def head(self, key: ChunkKey) -> ChunkInfo | None:
        return self.opened.head(key)

    def leading(self, keys: Sequence[ChunkKey]) -> list[ChunkInfo]:
        return self.opened.leading(keys)

    def read(
        self,
        key: ChunkKey,
        slots: Collection[Slot] | None = None,
        into: Mapping[Slot, torch.Tensor] | None = None,
    ) -> Chunk | None:
        return self.opened.read(key, slots, into)

    def write(self, chunk: Chunk) -> None:
        self.opened.write(chunk)

    def delete(self, key: ChunkKey) -> bool:
        return self.opened.delete(key)

    def keys(self) -> Iterator[ChunkKey]:
        return self.opened.keys()

    def usage(self) -> TierUsage:
        return self.opened.usage()

    def pin(self, key: ChunkKey) -> bool:
        return self.opened.pin(key)

    def unpin(self, key: ChunkKey) -> bool:
        return self.opened.unpin(key)

    def quarantine(self, key: ChunkKey) -> None:
        self.opened.quarantine(key)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._tier is not None:
                self._tier.close()
