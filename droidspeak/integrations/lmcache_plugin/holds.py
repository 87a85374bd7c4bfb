"""What a lookup has promised: memory objects that are read, checked, and kept until they are unpinned.

LMCache pins key by key, so a chunk of layers is pinned once for each of them. A pin that is never taken
back (an aborted request, say) ends by itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from droidspeak.integrations.lmcache_plugin.loading import give_back
from droidspeak.storage import ChunkKey

__all__ = ["Holds"]


@dataclass
class _Hold:
    objects: Sequence[Any]
    pins: int
    since: float


class Holds:
    """Held chunks. Each owns one reference of its memory objects.

    Args:
        timeout: seconds from the last pin until a hold ends by itself.
    """

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout, self._clock = timeout, clock
        self._lock = threading.Lock()
        self._holds: dict[ChunkKey, _Hold] = {}

    def among(self, keys: Sequence[ChunkKey]) -> set[ChunkKey]:
        """Those of `keys` that are held."""
        with self._lock:
            return {key for key in keys if key in self._holds}

    def pin(self, key: ChunkKey, pins: int) -> bool:
        """Pins `key` `pins` times more; whether it is held."""
        with self._lock:
            hold = self._holds.get(key)
            if hold:
                hold.pins += pins
                hold.since = self._clock()
            return hold is not None

    def add(self, key: ChunkKey, objects: Sequence[Any], pins: int) -> None:
        """Takes over the reference of `objects`, and pins `key`."""
        with self._lock:
            there = self._holds.get(key)
            if there is None:
                self._holds[key] = _Hold(objects, pins, self._clock())
                return
            there.pins += pins
        give_back(objects)

    def take(self, key: ChunkKey, places: Sequence[int]) -> list[Any] | None:
        """The objects at `places`, with a reference each for the caller; `None` if `key` is not held."""
        with self._lock:
            hold = self._holds.get(key)
            if hold is None:
                return None
            taken = [hold.objects[place] for place in places]
            for memory_obj in taken:
                memory_obj.ref_count_up()
            return taken

    def unpin(self, key: ChunkKey, pins: int = 1) -> bool:
        """Takes pins back; whether `key` was held."""
        with self._lock:
            hold = self._holds.get(key)
            if hold is None:
                return False
            hold.pins -= pins
            if hold.pins > 0:
                return True
            del self._holds[key]
        give_back(hold.objects)
        return True

    def sweep(self) -> None:
        """Ends holds whose time is over."""
        limit = self._clock() - self._timeout
        self._drop(lambda hold: hold.since <= limit)

    def clear(self) -> None:
        """Ends all holds."""
        self._drop(lambda _: True)

    def __len__(self) -> int:
        return len(self._holds)

    def _drop(self, ends: Callable[[_Hold], bool]) -> None:
        with self._lock:
            ended = {key: hold for key, hold in self._holds.items() if ends(hold)}
            for key in ended:
                del self._holds[key]
        for hold in ended.values():
            give_back(hold.objects)
