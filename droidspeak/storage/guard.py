"""The guard around one tier: a deadline for each call, and a breaker that skips a failing tier.

Calls run on daemon threads (`DeadlineThreads`), so a hung disk or socket is left behind. Reading and
writing have a breaker each: a full or read-only disk must still be read. Changes of one key take turns,
also behind one that overstays, so a late write never brings back what was deleted after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from droidspeak.errors import ConfigError, StorageError, TierFull, TierTimeout, TierUnavailable
from droidspeak.storage.breaker import BreakerState, CircuitBreaker
from droidspeak.storage.changes import Changes
from droidspeak.storage.deadline import DeadlineThreads
from droidspeak.storage.keys import ChunkKey, SourceId
from droidspeak.storage.tier import ChunkInfo, ChunkRecord, SlotBytes, Tier, TierUsage

if TYPE_CHECKING:
    from droidspeak.storage.reports import Fold

if TYPE_CHECKING:
    import torch

    from droidspeak.storage.container import Chunk, Slot
    from droidspeak.storage.selection import Selection

__all__ = ["GuardedTier", "Limits"]

_log = logging.getLogger(__name__)
_KEYS_AT_ONCE = 1000
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How long one call may take, in seconds, and when a failing tier is tried again.

    Attributes:
        read_deadline: of a lookup or a read.
        write_deadline: of a change, and of a question about the whole tier.
        threshold: failures in a row after which the tier is skipped.
        cooldown, max_cooldown: for how long, at first and at most.
        threads: calls at one time.

    Raises:
        ConfigError: a number that is not positive.
    """

    read_deadline: float = 5.0
    write_deadline: float = 60.0
    threshold: int = 1
    cooldown: float = 5.0
    max_cooldown: float = 300.0
    threads: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ConfigError(f"{name} of {value}; allowed are positive numbers")

    def breaker(self) -> CircuitBreaker:
        """A new breaker of these limits."""
        return CircuitBreaker(self.threshold, self.cooldown, self.max_cooldown)


@dataclass(frozen=True)
class _Side:
    """Reading or writing."""

    name: str
    breaker: CircuitBreaker


class GuardedTier(Tier):
    """`tier` with deadlines and breakers; its own errors pass through unchanged.

    In-memory tiers are called directly: they cannot hang, and a thread hop would cost more than the hit.
    """

    def __init__(self, tier: Tier, limits: Limits | None = None) -> None:
        self.tier, self.name = tier, tier.name
        self.in_memory, self.best_read = tier.in_memory, tier.best_read  # type: ignore[misc]
        self._limits = limits or Limits()
        self._reading = _Side("reading", self._limits.breaker())
        self._writing = _Side("writing", self._limits.breaker())
        self._changes = Changes()
        self._threads = None if tier.in_memory else DeadlineThreads(self._limits.threads, f"tier {tier.name}")
        self._full = False

    @property
    def reading(self) -> BreakerState:
        """Whether the tier is read."""
        return self._reading.breaker.state

    @property
    def writing(self) -> BreakerState:
        """Whether the tier is changed."""
        return self._writing.breaker.state

    def head(self, key: ChunkKey) -> ChunkInfo | None:
        return self._read(lambda: self.tier.head(key))

    def leading(self, keys: Sequence[ChunkKey]) -> list[ChunkInfo]:
        return self._read(lambda: self.tier.leading(keys))

    def read(
        self,
        key: ChunkKey,
        slots: Collection[Slot] | None = None,
        into: Mapping[Slot, torch.Tensor] | None = None,
    ) -> Chunk | None:
        """As of the tier; after a `TierTimeout` the late call may still write into `into`."""
        return self._read(lambda: self.tier.read(key, slots, into))

    def write(self, chunk: Chunk) -> None:
        try:
            self._change(chunk.key, lambda: self.tier.write(chunk))
        except TierFull as error:
            if not self._full:
                _log.warning("tier %s is full: %s", self.name, error)
            self._full = True
            raise
        self._full = False

    def delete(self, key: ChunkKey) -> bool:
        return self._change(key, lambda: self.tier.delete(key))

    def pin(self, key: ChunkKey) -> bool:
        return self._change(key, lambda: self.tier.pin(key))

    def unpin(self, key: ChunkKey) -> bool:
        return self._change(key, lambda: self.tier.unpin(key))

    def evict(self, nbytes: int) -> int:
        return self._run(self._writing, lambda: self.tier.evict(nbytes), self._limits.write_deadline)

    def evicted(self) -> TierUsage:
        return self.tier.evicted()

    def stamp(self, key: ChunkKey) -> int:
        """See `Changes.stamp`; of the changes made through this guard."""
        return self._changes.stamp(key)

    def quarantine(self, key: ChunkKey, since: int | None = None) -> None:
        """As of a tier, unless `key` has changed after the stamp `since`: then this is another object."""

        def unless_changed() -> None:
            if since is None or since == self._changes.stamp(key):
                self.tier.quarantine(key)

        self._change(key, unless_changed)

    def keys(self) -> Iterator[ChunkKey]:
        """The deadline is for a thousand keys."""
        return self._in_batches(self.tier.keys)

    def records(self) -> Iterator[ChunkRecord]:
        """As `keys`."""
        return self._in_batches(self.tier.records)

    def select(self, selection: Selection) -> Iterator[ChunkRecord]:
        """As `keys`."""
        return self._in_batches(lambda: self.tier.select(selection))

    def _in_batches(self, listing: Callable[[], Iterator[T]]) -> Iterator[T]:
        rows = self._question(listing)
        while batch := self._question(lambda: list(islice(rows, _KEYS_AT_ONCE))):
            yield from batch

    def sources(self) -> dict[SourceId, TierUsage]:
        return self._question(self.tier.sources)

    def slot_bytes(self) -> dict[SourceId, SlotBytes]:
        return self._question(self.tier.slot_bytes)

    def usage(self) -> TierUsage:
        return self._question(self.tier.usage)

    def put_report(self, name: str, data: bytes) -> bool:
        return self._run(self._writing, lambda: self.tier.put_report(name, data), self._limits.write_deadline)

    def reports(self) -> Iterator[tuple[str, bytes]]:
        return iter(self._question(lambda: list(self.tier.reports())))

    def fold_reports(self, fold: Fold) -> None:
        self._run(self._writing, lambda: self.tier.fold_reports(fold), self._limits.write_deadline)

    def close(self) -> None:
        """Closes the tier when its calls have ended; waits for that no longer than a write may take."""
        if self._threads is None:
            self.tier.close()
            return
        try:
            self._threads.close(self.tier.close, self._limits.write_deadline)
        except TierTimeout as error:
            _log.warning("not closed: %s", error)

    def _read(self, call: Callable[[], T]) -> T:
        return self._run(self._reading, call, self._limits.read_deadline)

    def _question(self, call: Callable[[], T]) -> T:
        return self._run(self._reading, call, self._limits.write_deadline)

    def _change(self, key: ChunkKey, call: Callable[[], T]) -> T:
        if self._threads is None:  # memory is never quarantined for what a read that hung has seen
            return call()

        def in_turn() -> T:
            with self._changes.turn(key):
                return call()

        return self._run(self._writing, in_turn, self._limits.write_deadline)

    def _run(self, side: _Side, call: Callable[[], T], deadline: float) -> T:
        if self._threads is None:
            return call()
        if not side.breaker.allow():
            raise TierUnavailable(f"{side.name} tier {self.name} is skipped until it works again")
        try:
            answer = self._threads.run(call, deadline)
        except (TierUnavailable, TierTimeout) as error:
            if side.breaker.fail():
                _log.warning("%s tier %s fails and is skipped for a while: %s", side.name, self.name, error)
            raise
        except StorageError:
            self._worked(side)
            raise
        self._worked(side)
        return answer

    def _worked(self, side: _Side) -> None:
        if side.breaker.succeed():
            _log.warning("%s tier %s works again", side.name, self.name)
