"""A level of a tiered store: one tier, and what stands in front of it.

    write    memory at once; any other tier through a backlog (write-back)
    read     what waits to be written, else the tier; callers of the same slots share one read
    corrupt  the object is quarantined and counted

What waits to be written can be read and found, so a chunk is never out of sight between two tiers.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch

from droidspeak.errors import ChunkCorrupt, StorageError, TierFull, TierTimeout, TierUnavailable
from droidspeak.logs import limited
from droidspeak.storage.backlog import Backlog
from droidspeak.storage.container import Chunk, Slot
from droidspeak.storage.counters import Counters
from droidspeak.storage.guard import GuardedTier, Limits
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.singleflight import SingleFlight
from droidspeak.storage.tier import ChunkInfo, ChunkRecord, Tier, TierQueue

__all__ = ["Level"]

_log = limited(logging.getLogger(__name__))


class Level:
    """One tier behind its guard.

    Args:
        capacity: bytes that may wait to be written.
        counters: of the store; see `TieredStore`.
    """

    def __init__(self, tier: Tier, limits: Limits, capacity: int, counters: Counters) -> None:
        self.tier = GuardedTier(tier, limits)
        self.name = tier.name
        self._counters = counters
        self._flights: SingleFlight[Chunk | None] = SingleFlight(_copy)
        self._backlog = (
            None if tier.in_memory else Backlog(self._write_back, capacity, f"droidspeak write {tier.name}")
        )

    def head(self, key: ChunkKey) -> ChunkInfo | None:
        """As of a tier."""
        if self._backlog and (chunk := self._backlog.get(key)) is not None:
            return ChunkInfo.of(chunk)
        with self._counting():
            info = self.tier.head(key)
        return info.held_by(self.name) if info else None

    def leading(self, keys: Sequence[ChunkKey]) -> list[ChunkInfo]:
        """As of a tier."""
        # Taken before the tier is asked: what is written in between is in both, never in neither.
        waiting = self._backlog.among(keys) if self._backlog else {}
        found: list[ChunkInfo] = []
        while len(found) < len(keys):
            rest = keys[len(found) :]
            if chunk := waiting.get(rest[0]):
                found.append(ChunkInfo.of(chunk))
                continue
            stop = next((n for n, key in enumerate(rest) if key in waiting), len(rest))
            with self._counting():
                run = self.tier.leading(rest[:stop])
            found += [info.held_by(self.name) for info in run]
            if len(run) < stop:
                break
        return found

    def read(
        self,
        key: ChunkKey,
        slots: Collection[Slot] | None = None,
        into: Mapping[Slot, torch.Tensor] | None = None,
    ) -> Chunk | None:
        """As of a tier."""
        if self._backlog is None:
            return self.tier.read(key, slots, into)
        if (chunk := self._backlog.get(key)) is not None:
            records = chunk.header.select(slots)
            return Chunk(chunk.header, {record.slot: chunk.payload[record.slot] for record in records})
        part = None if slots is None else frozenset(slots)
        got, shared = self._flights.fetch(key, part, lambda: self._read_tier(key, slots, into))
        if shared:
            self._counters.add("shared_reads", self.name)
        return got

    def _read_tier(
        self, key: ChunkKey, slots: Collection[Slot] | None, into: Mapping[Slot, torch.Tensor] | None
    ) -> Chunk | None:
        stamp = self.tier.stamp(key)
        try:
            with self._counting():
                return self.tier.read(key, slots, into)
        except ChunkCorrupt as error:
            self._counters.add("corrupt", self.name)
            _log.warning("tier %s: %s; quarantined", self.name, error)
            with suppress(StorageError):
                self.tier.quarantine(key, since=stamp)
            raise

    @contextmanager
    def _counting(self) -> Iterator[None]:
        try:
            yield
        except (TierUnavailable, TierTimeout):
            self._counters.add("failures", self.name)
            raise

    def write(self, chunk: Chunk, timeout: float) -> None:
        """Memory holds `chunk` on return; any other tier when `flush` has returned.

        Raises:
            TierFull: memory has no room, and an older chunk of the key may still be there.
            TierUnavailable: the backlog had no room within `timeout` s.
        """
        if self._backlog is None:
            self.tier.write(chunk)
        elif not self._backlog.add(chunk.key, chunk, chunk.nbytes, timeout):
            raise TierUnavailable(f"tier {self.name}: chunk {chunk.key} found no room in the write queue")

    def _write_back(self, chunk: Chunk) -> None:
        with self._changing(chunk.key):
            try:
                self.tier.write(chunk)
            except StorageError as error:
                self._counters.add("write_failures", self.name)
                _log.debug("chunk %s not written to tier %s: %s", chunk.key, self.name, error)
                if isinstance(error, TierFull):
                    with suppress(StorageError):
                        self.tier.delete(chunk.key)

    def delete(self, key: ChunkKey, timeout: float) -> bool:
        """Removes `key` here, waiting to be written or not; whether it was there.

        Raises:
            TierTimeout: it is still being written after `timeout` s.
        """
        waited = self._backlog.cancel(key, timeout) if self._backlog else False
        with self._changing(key):
            return self.tier.delete(key) or waited

    def quarantine(self, key: ChunkKey, timeout: float) -> None:
        """As of a tier, and drops what waits to be written under `key`. Raises as `delete`."""
        if self._backlog:
            self._backlog.cancel(key, timeout)
        with self._changing(key):
            self.tier.quarantine(key)

    def evict(self, nbytes: int) -> int:
        """As of a tier; what waits to be written stays."""
        with self._counting():
            return self.tier.evict(nbytes)

    @contextmanager
    def _changing(self, key: ChunkKey) -> Iterator[None]:
        """A change of the tier; reads that begin after it do not join reads that began before."""
        try:
            yield
        finally:
            self._flights.forget(key)

    def keys(self) -> Iterator[ChunkKey]:
        """Keys in the tier, and those that wait. A key may come twice."""
        if self._backlog:
            yield from self._backlog.keys()
        yield from self.tier.keys()

    @property
    def waiting(self) -> TierQueue | None:
        """What waits to be written; `None` of memory, which is written at once."""
        backlog = self._backlog
        return TierQueue(backlog.nbytes, backlog.capacity) if backlog else None

    def records(self) -> Iterator[ChunkRecord]:
        """Records of the tier, and of what waits, which is in no tier yet. A chunk may come twice."""
        for key in self._backlog.keys() if self._backlog else ():
            if self._backlog and (chunk := self._backlog.get(key)) is not None:
                yield ChunkRecord(ChunkInfo.of(chunk))
        yield from self.tier.records()

    def settle(self, key: ChunkKey, timeout: float) -> bool:
        """Waits until `key` is written; whether that came within `timeout` s."""
        return self._backlog is None or self._backlog.settle(key, timeout)

    def flush(self, timeout: float) -> bool:
        """Waits until all is written that has come so far; whether that came within `timeout` s."""
        return self._backlog is None or self._backlog.flush(timeout)

    def close(self, timeout: float) -> None:
        """Writes what waits, for `timeout` s at most, and closes the tier."""
        if self._backlog and not self._backlog.close(timeout):
            _log.warning("tier %s: closed before everything was written", self.name)
        self.tier.close()


def _copy(chunk: Chunk | None) -> Chunk | None:
    if chunk is None:
        return None
    return Chunk(chunk.header, {slot: stored.clone() for slot, stored in chunk.payload.items()})
