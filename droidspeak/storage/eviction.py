"""Eviction: who leaves when a tier is full.

A policy is three small moves over a ledger of FIFO queues: `admit`, `touch`, `victim`. The ledger is
memory (`MemoryLedger`) or the disk tier's catalog, so each policy is written once.

S3-FIFO: Yang et al., "FIFO queues are all you need for cache eviction", SOSP'23, algorithm 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, replace
from typing import ClassVar

from droidspeak.errors import ConfigError
from droidspeak.storage.keys import ChunkKey

__all__ = ["LRU", "S3FIFO", "Entry", "EvictionPolicy", "Ledger", "MemoryLedger", "get_eviction"]

MAIN, SMALL = "main", "small"


@dataclass(frozen=True, slots=True)
class Entry:
    """A chunk as eviction sees it. `nbytes` counts against the tier's capacity."""

    key: ChunkKey
    nbytes: int
    queue: str = MAIN
    hits: int = 0
    pinned: bool = False

    def used_again(self) -> Entry:
        """The same with one more hit."""
        return Entry(self.key, self.nbytes, self.queue, self.hits + 1, self.pinned)


class Ledger(ABC):
    """Entries in named FIFO queues, and the keys that left not long ago."""

    @abstractmethod
    def get(self, key: ChunkKey) -> Entry | None:
        """The entry of `key`."""

    @abstractmethod
    def put(self, entry: Entry) -> None:
        """Sets the entry and makes it the newest of its queue."""

    @abstractmethod
    def set_hits(self, key: ChunkKey, hits: int) -> None:
        """Changes the hits and leaves the entry where it stands."""

    @abstractmethod
    def oldest(self, queue: str) -> Entry | None:
        """The oldest unpinned entry of `queue`."""

    @abstractmethod
    def nbytes(self, queue: str | None = None) -> int:
        """Bytes in `queue`, or in all."""

    @abstractmethod
    def remember_ghost(self, key: ChunkKey) -> None:
        """Notes that `key` left without a second use. The number of ghosts is bounded."""

    @abstractmethod
    def forget_ghost(self, key: ChunkKey) -> bool:
        """Whether `key` was a ghost; it no longer is."""


class MemoryLedger(Ledger):
    """A ledger in dictionaries."""

    def __init__(self, max_ghosts: int = 100_000) -> None:
        self._queues: defaultdict[str, OrderedDict[ChunkKey, Entry]] = defaultdict(OrderedDict)
        self._bytes: defaultdict[str, int] = defaultdict(int)
        self._where: dict[ChunkKey, str] = {}
        self._ghosts: OrderedDict[ChunkKey, None] = OrderedDict()
        self._max_ghosts = max_ghosts

    def get(self, key: ChunkKey) -> Entry | None:
        queue = self._where.get(key)
        return None if queue is None else self._queues[queue][key]

    def put(self, entry: Entry) -> None:
        self.remove(entry.key)
        self._queues[entry.queue][entry.key] = entry
        self._bytes[entry.queue] += entry.nbytes
        self._where[entry.key] = entry.queue

    def remove(self, key: ChunkKey) -> None:
        """Takes `key` out, if it is there."""
        queue = self._where.pop(key, None)
        if queue is not None:
            self._bytes[queue] -= self._queues[queue].pop(key).nbytes

    def set_hits(self, key: ChunkKey, hits: int) -> None:
        queue = self._queues[self._where[key]]
        queue[key] = replace(queue[key], hits=hits)

    def set_pinned(self, key: ChunkKey, pinned: bool) -> None:
        """Pins or unpins `key` and leaves the entry where it stands."""
        queue = self._queues[self._where[key]]
        queue[key] = replace(queue[key], pinned=pinned)

    def oldest(self, queue: str) -> Entry | None:
        return next((entry for entry in self._queues[queue].values() if not entry.pinned), None)

    def nbytes(self, queue: str | None = None) -> int:
        return sum(self._bytes.values()) if queue is None else self._bytes[queue]

    def remember_ghost(self, key: ChunkKey) -> None:
        self._ghosts[key] = None
        while len(self._ghosts) > self._max_ghosts:
            self._ghosts.popitem(last=False)

    def forget_ghost(self, key: ChunkKey) -> bool:
        return self._ghosts.pop(key, self) is None


class EvictionPolicy(ABC):
    """Chooses who leaves. Holds no state of its own: all of it is in the ledger."""

    name: ClassVar[str]

    @abstractmethod
    def admit(self, ledger: Ledger, key: ChunkKey, nbytes: int) -> None:
        """A chunk has come."""

    @abstractmethod
    def touch(self, ledger: Ledger, key: ChunkKey) -> None:
        """A chunk has been used. Unknown keys are ignored."""

    @abstractmethod
    def victim(self, ledger: Ledger) -> Entry | None:
        """Who leaves next; `None` when everything is pinned. The caller removes it."""


class LRU(EvictionPolicy):
    """The least recently used leaves."""

    name = "lru"

    def admit(self, ledger: Ledger, key: ChunkKey, nbytes: int) -> None:
        ledger.put(Entry(key, nbytes))

    def touch(self, ledger: Ledger, key: ChunkKey) -> None:
        if entry := ledger.get(key):
            ledger.put(entry.used_again())

    def victim(self, ledger: Ledger) -> Entry | None:
        return ledger.oldest(MAIN)


class S3FIFO(EvictionPolicy):
    """A small probation queue in front of a main one: what is used only once leaves early."""

    name = "s3-fifo"
    small_share: ClassVar[float] = 0.1
    max_hits: ClassVar[int] = 3

    def admit(self, ledger: Ledger, key: ChunkKey, nbytes: int) -> None:
        ledger.put(Entry(key, nbytes, queue=MAIN if ledger.forget_ghost(key) else SMALL))

    def touch(self, ledger: Ledger, key: ChunkKey) -> None:
        if entry := ledger.get(key):
            ledger.set_hits(key, min(entry.hits + 1, self.max_hits))

    def victim(self, ledger: Ledger) -> Entry | None:
        while True:
            small = ledger.oldest(SMALL)
            main = ledger.oldest(MAIN)
            probation = ledger.nbytes(SMALL) >= self.small_share * ledger.nbytes()
            if small and (probation or main is None):
                if small.hits <= 1:
                    ledger.remember_ghost(small.key)
                    return small
                ledger.put(replace(small, queue=MAIN, hits=0))
            elif main is None or main.hits == 0:
                return main
            else:
                ledger.put(replace(main, hits=main.hits - 1))


_POLICIES: dict[str, type[EvictionPolicy]] = {policy.name: policy for policy in (LRU, S3FIFO)}


def get_eviction(name: str) -> EvictionPolicy:
    """The policy called `name`. Raises `ConfigError` naming the policies there are."""
    try:
        return _POLICIES[name]()
    except KeyError:
        raise ConfigError(f"unknown eviction {name!r}; allowed: {', '.join(sorted(_POLICIES))}") from None
