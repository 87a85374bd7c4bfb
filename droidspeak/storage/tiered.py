"""The tiered store: tiers from fast to slow, seen as one.

    lookup   the longest leading run, each chunk wherever it is
    read     fastest tier first; a failing tier is passed over; what a slower tier gave is promoted
    write    memory at once, slower tiers behind a bounded queue each
    corrupt  the object is quarantined, counted, and the next tier is asked

Each tier stands behind a guard (deadline, breaker), so that a dead one costs one bounded delay. Writes
and deletes of one key take turns; whoever reads after one has returned sees what it did.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch

from droidspeak.errors import (
    ChunkCorrupt,
    ChunkIncomplete,
    ConfigError,
    StorageError,
    TierFull,
    TierTimeout,
    TierUnavailable,
    UsageError,
)
from droidspeak.storage.changes import Changes
from droidspeak.storage.container import Chunk, Slot
from droidspeak.storage.counters import Counters
from droidspeak.storage.guard import Limits
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.level import Level
from droidspeak.storage.promotion import Promoter
from droidspeak.storage.tier import ChunkInfo, ChunkRecord, Tier, TierQueue, TierUsage

if TYPE_CHECKING:
    from droidspeak.storage.reports import Fold

__all__ = ["TieredStore", "WriteBackOptions"]


@dataclass(frozen=True)
class WriteBackOptions:
    """Bytes that may wait per tier, and seconds: for room in a queue, and for the end at close."""

    capacity: int = 1 << 30
    put_timeout: float = 5.0
    close_timeout: float = 60.0


class TieredStore(Tier):
    """Several tiers as one; itself a `Tier`.

    Args:
        tiers: from fast to slow, names all different. The store closes them.
        limits: deadlines and breakers by tier name; the default for those not named.
        promote: copy what a slower tier gave into the faster ones, in the background.
        write_back: bounds of the queues in front of slower tiers.

    Attributes:
        counters: by tier `hits`, `shared_reads`, `promotions`, `corrupt`, `failures` (calls that failed
            or were skipped), `write_failures`, `writes_dropped` (no room in the queue); and `misses`.

    Raises:
        ConfigError: no tiers, two of one name, or limits for a tier that is not there.
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
        limits = limits or {}
        _check_names([tier.name for tier in tiers], limits)
        self.name = name
        self.counters = Counters()
        self._options = write_back or WriteBackOptions()
        self._levels = [
            Level(tier, limits.get(tier.name, Limits()), self._options.capacity, self.counters)
            for tier in tiers
        ]
        self._changes = Changes()
        self._promoter = Promoter(self._levels, self._changes, self.counters) if promote else None
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
        """As `leading` of one key."""
        failed = 0
        for level in self._levels:
            try:
                if info := level.head(key):
                    return info
            except StorageError:
                failed += 1
        if failed == len(self._levels):
            raise TierUnavailable(f"no tier of {self.name} answers")
        return None

    def leading(self, keys: Sequence[ChunkKey]) -> list[ChunkInfo]:
        """Each tier goes on where another has come to a gap. A tier that fails has nothing.

        Raises:
            TierUnavailable: no tier answers.
        """
        found: list[ChunkInfo] = []
        ring, without = list(self._levels), 0
        while ring and without < len(ring) and len(found) < len(keys):
            level = ring.pop(0)
            try:
                run = level.leading(keys[len(found) :])
            except StorageError:
                continue
            ring.append(level)
            found += run
            without = 1 if run else without + 1
        if not ring:
            raise TierUnavailable(f"no tier of {self.name} answers")
        return found

    def read(
        self,
        key: ChunkKey,
        slots: Collection[Slot] | None = None,
        into: Mapping[Slot, torch.Tensor] | None = None,
    ) -> Chunk | None:
        """As of a tier.

        After a `TierTimeout` the late call may still write into `into`, so no other tier is asked.
        """
        errors: list[StorageError] = []
        try:
            chunk = self._read_first(key, slots, into, errors)
            if chunk is None and errors:
                raise min(errors, key=_telling)
        finally:
            # Tracebacks keep frames, and this one the errors: the caller's memory would wait for the
            # garbage collector.
            errors.clear()
        if chunk is None:
            self.counters.add("misses")
        return chunk

    def _read_first(
        self,
        key: ChunkKey,
        slots: Collection[Slot] | None,
        into: Mapping[Slot, torch.Tensor] | None,
        errors: list[StorageError],
    ) -> Chunk | None:
        stamp = self._changes.stamp(key)
        for index, level in enumerate(self._levels):
            try:
                chunk = level.read(key, slots, into)
            except StorageError as error:
                errors.append(error)
                if into and isinstance(error, TierTimeout):
                    break
                continue
            if chunk is not None:
                self.counters.add("hits", level.name)
                if index and self._promoter:
                    self._promoter.offer(index, chunk, stamp, owned=bool(into))
                return chunk
        return None

    def write(self, chunk: Chunk) -> None:
        """Memory tiers hold the chunk on return; slower ones when `flush` has returned.

        The chunk is kept, not copied: its tensors must not change afterwards. What goes wrong behind a
        queue is counted, and logged once until the tier works again.

        Raises:
            ChunkIncomplete: slots are missing.
            TierFull, TierUnavailable: no tier took it.
        """
        if not chunk.complete:
            raise ChunkIncomplete(f"chunk {chunk.key} has {len(chunk.payload)} of its slots")
        with self._changes.turn(chunk.key):
            errors = [self._write_to(level, chunk) for level in self._levels]
            if all(errors):
                raise next(error for error in reversed(errors) if error)
            for level, error in zip(self._levels, errors, strict=True):
                # An older chunk of the key must not stand in front of the new one.
                if isinstance(error, TierFull):
                    with suppress(StorageError):
                        level.delete(chunk.key, self._options.put_timeout)

    def _write_to(self, level: Level, chunk: Chunk) -> StorageError | None:
        try:
            level.write(chunk, self._options.put_timeout)
        except StorageError as error:
            self.counters.add("write_failures" if level.tier.in_memory else "writes_dropped", level.name)
            return error
        return None

    def delete(self, key: ChunkKey) -> bool:
        """As of a tier, from all tiers.

        Raises:
            TierUnavailable, TierTimeout: it may still be in a tier.
        """
        with self._changes.turn(key):
            there, errors = self._everywhere(lambda level: level.delete(key, self._options.put_timeout))
        if errors:
            raise errors[0]
        return there

    def keys(self) -> Iterator[ChunkKey]:
        """Raises `TierUnavailable` or `TierTimeout` when a tier cannot be listed."""
        seen: set[ChunkKey] = set()
        for key in chain.from_iterable(level.keys() for level in self._levels):
            if key not in seen:
                seen.add(key)
                yield key

    def records(self) -> Iterator[ChunkRecord]:
        """One for each tier that holds a chunk, `info.tier` its name; without one for what waits to be
        written. Raises as `keys`."""
        return chain.from_iterable(level.records() for level in self._levels)

    def usage(self) -> TierUsage:
        """Different chunks, and bytes in all tiers together, without those that wait to be written.

        All keys are walked. See `by_tier` for the parts.
        """
        return TierUsage(sum(1 for _ in self.keys()), sum(usage.nbytes for usage in self.by_tier().values()))

    def by_tier(self) -> dict[str, TierUsage]:
        """Usage of each tier that answers."""
        table = {}
        for level in self._levels:
            with suppress(StorageError):
                table[level.name] = level.tier.usage()
        return table

    def queues(self) -> dict[str, TierQueue]:
        """What waits to be written, by tier."""
        return {level.name: level.waiting for level in self._levels if level.waiting}

    @property
    def promoting(self) -> int:
        """Bytes of the chunks that wait to be promoted."""
        return self._promoter.nbytes if self._promoter else 0

    def pin(self, key: ChunkKey) -> bool:
        """As of a tier, in each that holds `key`; waits until it is written."""
        for level in self._levels:
            level.settle(key, self._options.close_timeout)
        return self._anywhere(lambda level: level.tier.pin(key))

    def unpin(self, key: ChunkKey) -> bool:
        return self._anywhere(lambda level: level.tier.unpin(key))

    def evict(self, nbytes: int) -> int:
        """As of a tier, from every tier that answers; bytes freed in all of them. Raises if none does."""
        freed, errors = 0, []
        for level in self._levels:
            try:
                freed += level.evict(nbytes)
            except StorageError as error:
                errors.append(error)
        if len(errors) == len(self._levels):
            raise errors[0]
        return freed

    def evict_from(self, name: str, nbytes: int) -> int:
        """As `evict`, from the tier called `name`. Raises `UsageError` for a tier that is not there."""
        for level in self._levels:
            if level.name == name:
                return level.evict(nbytes)
        names = ", ".join(level.name for level in self._levels)
        raise UsageError(f"no tier {name!r} in {self.name}; allowed: {names}")

    def quarantine(self, key: ChunkKey) -> None:
        """As of a tier, in all tiers that answer. Raises if none does."""
        with self._changes.turn(key):
            _, errors = self._everywhere(lambda level: level.quarantine(key, self._options.put_timeout))
        if len(errors) == len(self._levels):
            raise errors[0]

    def _anywhere(self, change: Callable[[Level], bool]) -> bool:
        """Whether it was done in any tier. Raises if it was not, and a tier failed."""
        there, errors = self._everywhere(change)
        if errors and not there:
            raise errors[0]
        return there

    def _everywhere(self, change: Callable[[Level], bool | None]) -> tuple[bool, list[StorageError]]:
        there, errors = False, []
        for level in self._levels:
            try:
                there |= bool(change(level))
            except StorageError as error:
                errors.append(error)
        return there, errors

    def put_report(self, name: str, data: bytes) -> bool:
        """As of a tier, in the first one that keeps reports, and never in another one: all count once."""
        return any(level.tier.put_report(name, data) for level in self._levels)

    def reports(self) -> Iterator[tuple[str, bytes]]:
        """Of all tiers; those that others have left in slower ones too."""
        return chain.from_iterable(level.tier.reports() for level in self._levels)

    def fold_reports(self, fold: Fold) -> None:
        """As of a tier, in each."""
        for level in self._levels:
            level.tier.fold_reports(fold)

    def persisted(self, key: ChunkKey, timeout: float) -> bool:
        """Whether a tier that outlives this process holds `key`; waits `timeout` s for its write.

        A store of memory tiers only has no such tier: there it is whether `key` is held at all.
        """
        lasting = [level for level in self._levels if not level.tier.in_memory]
        left = _countdown(timeout)
        for level in lasting or self._levels:
            with suppress(StorageError):
                if level.settle(key, left()) and level.tier.head(key):
                    return True
        return False

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until all writes and promotions that came before are done; whether that came in time.

        What a tier refused is done too: see `counters`.

        Args:
            timeout: seconds for all tiers together; the time for closing by default.
        """
        left = _countdown(self._options.close_timeout if timeout is None else timeout)
        promoted = self._promoter is None or self._promoter.flush(left())
        return all([promoted, *(level.flush(left()) for level in self._levels)])

    def close(self) -> None:
        """Writes what waits and closes the tiers; what hangs is left behind after a while."""
        if self._closed:
            return
        self._closed = True
        left = _countdown(self._options.close_timeout)
        if self._promoter:
            self._promoter.close(left())
        for level in self._levels:
            level.close(left())


def _check_names(names: list[str], limits: Mapping[str, Limits]) -> None:
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"a store needs tiers with different names, not {names}")
    if unknown := sorted(limits.keys() - set(names)):
        raise ConfigError(f"limits for {unknown}; the tiers are {names}")


def _countdown(seconds: float) -> Callable[[], float]:
    """What is left of `seconds` from now on."""
    end = time.monotonic() + seconds
    return lambda: max(0.0, end - time.monotonic())


def _telling(error: StorageError) -> int:
    """Orders errors by how much they tell of why a chunk that was there cannot be used."""
    order = (ChunkCorrupt, TierTimeout, TierUnavailable, ChunkIncomplete)
    return next((rank for rank, kind in enumerate(order) if isinstance(error, kind)), len(order))
