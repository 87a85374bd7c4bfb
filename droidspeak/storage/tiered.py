"""The tiered store: tiers from fast to slow, seen as one.

    lookup   the longest leading run, each chunk wherever it is
    read     fastest tier first; a failing tier is passed over; what a slower tier gave is promoted
    write    memory at once; slower tiers through a bounded queue each (`WriteBack`)
    corrupt  the object is quarantined, counted, and the next tier is asked

Each tier stands behind a guard (deadline, breaker), so that a dead one costs one bounded delay.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from droidspeak.errors import (
    ChunkCorrupt,
    ChunkIncomplete,
    ConfigError,
    StorageError,
    TierFull,
    TierTimeout,
    TierUnavailable,
)
from droidspeak.storage.container import Chunk, Slot
from droidspeak.storage.counters import Counters
from droidspeak.storage.guard import GuardedTier, Limits
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.promotion import Promoter
from droidspeak.storage.singleflight import SingleFlight
from droidspeak.storage.tier import ChunkInfo, Tier, TierUsage
from droidspeak.storage.writeback import WriteBack

__all__ = ["TieredStore", "WriteBackOptions"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WriteBackOptions:
    """Bytes that may wait per tier, and seconds: for room in a queue, and for the end at close."""

    capacity: int = 1 << 30
    put_timeout: float = 5.0
    close_timeout: float = 60.0


class _Level:
    """One tier of the store: its guard, and the queue in front of it if it is not memory."""

    def __init__(self, tier: Tier, limits: Limits, capacity: int, counters: Counters) -> None:
        self.tier = GuardedTier(tier, limits)
        self.name = tier.name
        self._counters = counters
        self.queue = None if tier.in_memory else WriteBack(self.tier, capacity, self._lost)

    def _lost(self, chunk: Chunk, error: StorageError) -> None:
        self._counters.add("write_failures", self.name)
        _log.debug("chunk %s not written to %s: %s", chunk.key, self.name, error)


class TieredStore(Tier):
    """Several tiers as one; itself a `Tier`.

    Args:
        tiers: from fast to slow, names all different.
        limits: deadlines and breakers by tier name; the default for those not named.
        promote: copy what a slower tier gave into the faster ones, in the background.
        write_back: bounds of the queues in front of slower tiers.

    Attributes:
        counters: `hits`, `corrupt`, `failures`, `write_failures`, `writes_dropped`, `promotions` by
            tier; `misses`, `shared_reads`.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        limits: Mapping[str, Limits] | None = None,
        promote: bool = True,
        write_back: WriteBackOptions | None = None,
        name: str = "store",
    ) -> None:
        names = [tier.name for tier in tiers]
        if not tiers or len(set(names)) != len(names):
            raise ConfigError(f"a store needs tiers with different names, not {names}")
        self.name = name
        self.counters = Counters()
        self._options = write_back or WriteBackOptions()
        limits = limits or {}
        self._levels = [
            _Level(tier, limits.get(tier.name, Limits()), self._options.capacity, self.counters)
            for tier in tiers
        ]
        self._flights: SingleFlight[Chunk | None] = SingleFlight(_private_copy)
        self._promoter = Promoter(self._promote) if promote and len(tiers) > 1 else None
        self._closed = False

    @property
    def tiers(self) -> list[Tier]:
        """The tiers behind their guards, from fast to slow."""
        return [level.tier for level in self._levels]

    @property
    def best_read(self) -> int:  # type: ignore[override]
        """Of the slowest tier: a larger range than needed never hurts the faster ones."""
        return self._levels[-1].tier.best_read

    def head(self, key: ChunkKey) -> ChunkInfo | None:
        run = self.leading([key])
        return run[0] if run else None

    def leading(self, keys: Sequence[ChunkKey]) -> list[ChunkInfo]:
        """Raises `TierUnavailable` only if no tier answers at all."""
        found: list[ChunkInfo] = []
        progress = True
        while progress and len(found) < len(keys):
            before, failed = len(found), 0
            for level in self._levels:
                try:
                    found += self._leading_in(level, keys[len(found) :])
                except StorageError as error:
                    self._failed(level, error)
                    failed += 1
            if failed == len(self._levels) and not found:
                raise TierUnavailable(f"no tier of {self.name} answers")
            progress = len(found) > before
        return found

    def _leading_in(self, level: _Level, keys: Sequence[ChunkKey]) -> list[ChunkInfo]:
        found: list[ChunkInfo] = []
        if level.queue and level.queue.nbytes:
            while len(found) < len(keys) and (chunk := level.queue.pending(keys[len(found)])):
                found.append(ChunkInfo.of(chunk))
        if len(found) == len(keys):
            return found
        return found + level.tier.leading(keys[len(found) :])

    def read(
        self,
        key: ChunkKey,
        slots: Collection[Slot] | None = None,
        into: Mapping[Slot, torch.Tensor] | None = None,
    ) -> Chunk | None:
        errors: list[StorageError] = []
        for index, level in enumerate(self._levels):
            try:
                chunk = self._read_from(level, key, slots, into)
            except StorageError as error:
                self._read_failed(level, key, error)
                errors.append(error)
                if into and isinstance(error, TierTimeout):
                    # The call that overstayed may still fill `into`: nobody else may use that memory.
                    break
                continue
            if chunk is not None:
                self.counters.add("hits", level.name)
                self._offer(index, chunk, private=not into)
                return chunk
        if errors:
            raise min(errors, key=_telling)
        self.counters.add("misses")
        return None

    def _read_from(
        self,
        level: _Level,
        key: ChunkKey,
        slots: Collection[Slot] | None,
        into: Mapping[Slot, torch.Tensor] | None,
    ) -> Chunk | None:
        if level.queue is None:
            return level.tier.read(key, slots, into)
        if (chunk := level.queue.pending(key)) is not None:
            chunk.header.select(slots)
            return chunk
        wanted = None if slots is None else frozenset(slots)
        chunk, shared = self._flights.fetch(
            (level.name, key, wanted), lambda: level.tier.read(key, slots, into)
        )
        if shared:
            self.counters.add("shared_reads")
        return chunk

    def _read_failed(self, level: _Level, key: ChunkKey, error: StorageError) -> None:
        if not isinstance(error, ChunkCorrupt):
            self._failed(level, error)
            return
        self.counters.add("corrupt", level.name)
        _log.warning("tier %s: %s; quarantined", level.name, error)
        try:
            level.tier.quarantine(key)
        except StorageError as second:
            self._failed(level, second)

    def _failed(self, level: _Level, error: StorageError) -> None:
        if not isinstance(error, ChunkIncomplete):
            self.counters.add("failures", level.name)

    def _offer(self, index: int, chunk: Chunk, *, private: bool) -> None:
        """Promotes a hit of level `index`: at once if it is whole and nobody else owns its memory."""
        if index == 0 or self._promoter is None:
            return
        self._promoter.offer(chunk.key, chunk if private and chunk.complete else None)

    def _promote(self, key: ChunkKey, chunk: Chunk | None) -> None:
        holder = next((n for n, level in enumerate(self._levels) if self._leading_in(level, [key])), 0)
        if holder == 0:
            return
        chunk = chunk or self._read_from(self._levels[holder], key, None, None)
        if chunk is None:
            return
        for level in self._levels[:holder]:
            self._store_in(level, chunk)
            self.counters.add("promotions", level.name)

    def _forget_promotion(self, key: ChunkKey) -> None:
        """What is about to change must not be overwritten by a promotion of what it was."""
        if self._promoter:
            self._promoter.cancel(key, self._options.put_timeout)

    def write(self, chunk: Chunk) -> None:
        """Memory tiers hold the chunk on return; slower ones when `flush` returns.

        Raises:
            TierFull, TierUnavailable: no tier took it.
        """
        self._forget_promotion(chunk.key)
        errors = [error for level in self._levels if (error := self._store_in(level, chunk))]
        if len(errors) == len(self._levels):
            raise errors[-1]

    def _store_in(self, level: _Level, chunk: Chunk) -> StorageError | None:
        if level.queue is not None:
            if level.queue.put(chunk, self._options.put_timeout):
                return None
            self.counters.add("writes_dropped", level.name)
            return TierUnavailable(f"tier {level.name}: its write queue stayed full")
        try:
            level.tier.write(chunk)
        except StorageError as error:
            self.counters.add("write_failures", level.name)
            # An older chunk of the key must not outlive a newer one that found no room.
            if isinstance(error, TierFull):
                level.tier.delete(chunk.key)
            return error
        return None

    def delete(self, key: ChunkKey) -> bool:
        self._forget_promotion(key)
        there, errors = False, []
        for level in self._levels:
            if level.queue:
                there |= level.queue.cancel(key, self._options.put_timeout)
            try:
                there |= level.tier.delete(key)
            except StorageError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return there

    def keys(self) -> Iterator[ChunkKey]:
        seen: set[ChunkKey] = set()
        for level in self._levels:
            for key in [*(level.queue.keys() if level.queue else ()), *level.tier.keys()]:
                if key not in seen:
                    seen.add(key)
                    yield key

    def usage(self) -> TierUsage:
        """Different chunks, and bytes over all tiers, without those that wait to be written."""
        return TierUsage(sum(1 for _ in self.keys()), sum(usage.nbytes for usage in self.by_tier().values()))

    def by_tier(self) -> dict[str, TierUsage]:
        """Usage of each tier that answers."""
        table = {}
        for level in self._levels:
            try:
                table[level.name] = level.tier.usage()
            except StorageError as error:
                self._failed(level, error)
        return table

    def pin(self, key: ChunkKey) -> bool:
        self.flush()
        return sum(level.tier.pin(key) for level in self._levels) > 0

    def unpin(self, key: ChunkKey) -> bool:
        return sum(level.tier.unpin(key) for level in self._levels) > 0

    def quarantine(self, key: ChunkKey) -> None:
        for level in self._levels:
            level.tier.quarantine(key)

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until all queued writes and promotions are done; whether that came in time (s)."""
        seconds = self._options.close_timeout if timeout is None else timeout
        promoted = self._promoter is None or self._promoter.flush(seconds)
        return all([promoted, *(level.queue.flush(seconds) for level in self._levels if level.queue)])

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._promoter:
            self._promoter.close()
        for level in self._levels:
            if level.queue and not level.queue.close(self._options.close_timeout):
                _log.warning("tier %s: closed with %d bytes unwritten", level.name, level.queue.nbytes)
            level.tier.close()


def _private_copy(chunk: Chunk | None) -> Chunk | None:
    if chunk is None:
        return None
    return Chunk(chunk.header, {slot: stored.clone() for slot, stored in chunk.payload.items()})


def _telling(error: StorageError) -> int:
    """Orders errors by how much they tell of why a chunk that was there cannot be used."""
    order = (ChunkCorrupt, TierTimeout, TierUnavailable, ChunkIncomplete)
    return next((rank for rank, kind in enumerate(order) if isinstance(error, kind)), len(order))
