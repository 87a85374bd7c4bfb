"""Layers of a chunk wait here until all of them have come.

LMCache hands over one layer after the other, and takes a chunk for complete when it sees its first. So
a chunk is published only as a whole. Layers that wait keep memory of LMCache's buffer: they are bounded
in bytes and in time, and the oldest chunk is forgotten first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from droidspeak.storage import ChunkKey

__all__ = ["Assembly"]


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_Sized)


@dataclass
class _Partial(Generic[T]):
    since: float
    nbytes: int = 0
    layers: dict[int, T] = field(default_factory=dict)

    def add(self, layer: int, item: T) -> int:
        """Takes `item` unless the layer is here; bytes that it adds."""
        if layer in self.layers:
            return 0
        self.layers[layer] = item
        self.nbytes += item.nbytes
        return item.nbytes


class Assembly(Generic[T]):
    """Incomplete chunks.

    Args:
        layers: of a chunk.
        capacity: bytes of all layers that wait.
        timeout: seconds from a chunk's first layer until it is forgotten.
        forgotten: told the reason, `"incomplete"` or `"no_room"`, and the layers that had come.
    """

    def __init__(
        self,
        layers: int,
        capacity: int,
        timeout: float,
        forgotten: Callable[[str, list[T]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layers, self._capacity, self._timeout = layers, capacity, timeout
        self._forgotten, self._clock = forgotten, clock
        self._lock = threading.Lock()
        self._partial: dict[ChunkKey, _Partial[T]] = {}
        self._bytes = 0

    def add(self, key: ChunkKey, layer: int, item: T) -> list[T] | None:
        """Takes a layer; all of them, in order, if it was the last. One that is already here is kept."""
        with self._lock:
            partial = self._partial.setdefault(key, _Partial(self._clock()))
            self._bytes += partial.add(layer, item)
            if len(partial.layers) == self._layers:
                self._remove(key)
                return [partial.layers[index] for index in range(self._layers)]
            gone = []
            # Python's dicts keep the order of insertion: the first is the oldest.
            while self._bytes > self._capacity:
                gone.append(self._remove(next(iter(self._partial))))
        self._tell("no_room", gone)
        return None

    def holds(self, key: ChunkKey, layer: int) -> bool:
        """Whether that layer waits."""
        with self._lock:
            partial = self._partial.get(key)
            return partial is not None and layer in partial.layers

    def sweep(self) -> None:
        """Forgets the chunks whose time is over."""
        with self._lock:
            limit = self._clock() - self._timeout
            old = [key for key, partial in self._partial.items() if partial.since <= limit]
            gone = [self._remove(key) for key in old]
        self._tell("incomplete", gone)

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            gone = [self._remove(key) for key in list(self._partial)]
        self._tell("incomplete", gone)

    def _remove(self, key: ChunkKey) -> _Partial[T]:
        partial = self._partial.pop(key)
        self._bytes -= partial.nbytes
        return partial

    def _tell(self, reason: str, gone: list[_Partial[T]]) -> None:
        for partial in gone:
            self._forgotten(reason, list(partial.layers.values()))
