"""Tiers around tiers: abilities by composition instead of flags.

    ReadOnlyTier   nothing is changed; a corrupt object is only hidden
    LatencyTier    a slow link in front of a fast tier, for demos and benchmarks
    FaultyTier     planned faults, for tests of what stands above
    MeteredTier    counts calls, bytes, seconds, misses and errors

A wrapper of your own overrides `WrapperTier._around`, which every call goes through.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from droidspeak.errors import StorageError, TierUnavailable, UsageError
from droidspeak.storage.container import Chunk, Slot
from droidspeak.storage.keys import ChunkKey, SourceId
from droidspeak.storage.tier import ChunkInfo, ChunkRecord, SlotBytes, Tier, TierUsage

if TYPE_CHECKING:
    from droidspeak.storage.reports import Fold
    from droidspeak.storage.selection import Selection

__all__ = [
    "Call",
    "Fault",
    "FaultyTier",
    "LatencyTier",
    "MeteredTier",
    "OperationStats",
    "ReadOnlyTier",
    "WrapperTier",
    "corrupt",
    "fail",
    "hang",
    "short",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One call of a tier's method.

    Attributes:
        operation: the method's name.
        run: makes the call.
        sent: bytes of the object that is written.
    """

    operation: str
    run: Callable[[], T]
    sent: int = 0


class WrapperTier(Tier):
    """Hands every call on to `tier`; the base of the other wrappers."""

    def __init__(self, tier: Tier, *, name: str | None = None) -> None:
        self.tier = tier
        self.name = name or tier.name
        self.in_memory, self.best_read = tier.in_memory, tier.best_read  # type: ignore[misc]

    def _around(self, call: Call[T]) -> T:
        """Makes one call; what a wrapper overrides."""
        return call.run()

    def head(self, key: ChunkKey) -> ChunkInfo | None:
        return self._around(Call("head", lambda: self.tier.head(key)))

    def leading(self, keys: Sequence[ChunkKey]) -> list[ChunkInfo]:
        return self._around(Call("leading", lambda: self.tier.leading(keys)))

    def read(
        self,
        key: ChunkKey,
        slots: Collection[Slot] | None = None,
        into: Mapping[Slot, torch.Tensor] | None = None,
    ) -> Chunk | None:
        return self._around(Call("read", lambda: self.tier.read(key, slots, into)))

    def write(self, chunk: Chunk) -> None:
        self._around(Call("write", lambda: self.tier.write(chunk), chunk.header.nbytes))

    def delete(self, key: ChunkKey) -> bool:
        return self._around(Call("delete", lambda: self.tier.delete(key)))

    def delete_unused(self, records: Sequence[ChunkRecord]) -> list[ChunkRecord]:
        return self._around(Call("delete", lambda: self.tier.delete_unused(records)))

    def keys(self) -> Iterator[ChunkKey]:
        return self._around(Call("keys", lambda: self.tier.keys()))  # noqa: PLW0108 - looked up when called

    def records(self) -> Iterator[ChunkRecord]:
        return self._around(Call("records", lambda: self._mine(self.tier.records())))

    def select(self, selection: Selection) -> Iterator[ChunkRecord]:
        return self._around(Call("records", lambda: self._selected(selection)))

    def _selected(self, selection: Selection) -> Iterator[ChunkRecord]:
        if self.name == self.tier.name:
            return self.tier.select(selection)
        return selection.of(self._mine(self.tier.records()))

    def _mine(self, records: Iterator[ChunkRecord]) -> Iterator[ChunkRecord]:
        """With this tier's name, where it has one of its own."""
        if self.name == self.tier.name:
            return records
        return (replace(record, info=record.info.held_by(self.name)) for record in records)

    def sources(self) -> dict[SourceId, TierUsage]:
        return self._around(Call("usage", lambda: self.tier.sources()))  # noqa: PLW0108

    def slot_bytes(self) -> dict[SourceId, SlotBytes]:
        return self._around(Call("records", lambda: self.tier.slot_bytes()))  # noqa: PLW0108

    def by_tier(self) -> dict[str, TierUsage]:
        return self._around(Call("usage", self._by_tier))

    def _by_tier(self) -> dict[str, TierUsage]:
        return self.tier.by_tier() if self.name == self.tier.name else {self.name: self.tier.usage()}

    def usage(self) -> TierUsage:
        return self._around(Call("usage", lambda: self.tier.usage()))  # noqa: PLW0108

    def pin(self, key: ChunkKey) -> bool:
        return self._around(Call("pin", lambda: self.tier.pin(key)))

    def unpin(self, key: ChunkKey) -> bool:
        return self._around(Call("unpin", lambda: self.tier.unpin(key)))

    def evict(self, nbytes: int) -> int:
        return self._around(Call("evict", lambda: self.tier.evict(nbytes)))

    def evicted(self) -> TierUsage:
        return self.tier.evicted()

    def quarantine(self, key: ChunkKey) -> None:
        self._around(Call("quarantine", lambda: self.tier.quarantine(key)))

    def put_report(self, name: str, data: bytes) -> bool:
        return self._around(Call("put_report", lambda: self.tier.put_report(name, data), len(data)))

    def reports(self) -> Iterator[tuple[str, bytes]]:
        return self._around(Call("reports", lambda: self.tier.reports()))  # noqa: PLW0108

    def fold_reports(self, fold: Fold) -> None:
        self._around(Call("fold_reports", lambda: self.tier.fold_reports(fold)))

    def close(self) -> None:
        self.tier.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self.tier!r}>"


class ReadOnlyTier(WrapperTier):
    """`tier` for readers: writing, deleting and pinning raise `TierUnavailable`, and nothing changes.

    A quarantined chunk is hidden from this wrapper's readers and stays where it is.
    """

    def __init__(self, tier: Tier, *, name: str | None = None) -> None:
        super().__init__(tier, name=name)
        self._hidden: set[ChunkKey] = set()

    def head(self, key: ChunkKey) -> ChunkInfo | None:
        return None if key in self._hidden else super().head(key)

    def leading(self, keys: Sequence[ChunkKey]) -> list[ChunkInfo]:
        gap = next((index for index, key in enumerate(keys) if key in self._hidden), len(keys))
        return super().leading(keys[:gap])

    def read(
        self,
        key: ChunkKey,
        slots: Collection[Slot] | None = None,
        into: Mapping[Slot, torch.Tensor] | None = None,
    ) -> Chunk | None:
        return None if key in self._hidden else super().read(key, slots, into)

    def keys(self) -> Iterator[ChunkKey]:
        held = super().keys()
        return (key for key in held if key not in self._hidden)

    def records(self) -> Iterator[ChunkRecord]:
        held = super().records()
        return (record for record in held if record.info.key not in self._hidden)

    def select(self, selection: Selection) -> Iterator[ChunkRecord]:
        return selection.of(self.records())

    def evict(self, nbytes: int) -> int:  # noqa: ARG002 - nothing leaves
        return 0

    def quarantine(self, key: ChunkKey) -> None:
        self._hidden.add(key)

    def put_report(self, name: str, data: bytes) -> bool:  # noqa: ARG002
        return False

    def fold_reports(self, fold: Fold) -> None:
        """Nothing: they stay as they are."""

    def _around(self, call: Call[T]) -> T:
        if call.operation in ("write", "delete", "pin", "unpin"):
            raise TierUnavailable(f"tier {self.name} is read-only")
        return call.run()


class LatencyTier(WrapperTier):
    """`tier` behind a slow link, which all calls share.

    Args:
        delay: seconds that each call takes at least; calls wait at the same time.
        bandwidth: bytes per second of payload, both ways together; `None` sets no bound.
    """

    def __init__(
        self, tier: Tier, *, delay: float = 0.0, bandwidth: float | None = None, name: str | None = None
    ) -> None:
        super().__init__(tier, name=name)
        self.in_memory = False  # type: ignore[misc]
        self._delay, self._bandwidth = delay, bandwidth
        self._free_at = 0.0
        self._lock = threading.Lock()

    def _around(self, call: Call[T]) -> T:
        start = time.monotonic()
        result = call.run()
        received = result.nbytes if isinstance(result, Chunk) else 0
        arrival = max(start, self._transfer(call.sent + received)) + self._delay
        time.sleep(max(0.0, arrival - time.monotonic()))
        return result

    def _transfer(self, nbytes: int) -> float:
        """When the link has carried `nbytes` more, after what it carries already."""
        if not self._bandwidth or not nbytes:
            return 0.0
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + nbytes / self._bandwidth
            return self._free_at


Fault = Callable[[Callable[[], Any]], Any]
"""What happens to one call: takes the call, gives the answer."""


def fail(error: StorageError) -> Fault:
    """The call raises `error`."""

    def fault(_call: Callable[[], Any]) -> Any:
        raise error

    return fault


def hang(seconds: float) -> Fault:
    """The call is answered `seconds` later."""

    def fault(call: Callable[[], Any]) -> Any:
        time.sleep(seconds)
        return call()

    return fault


def corrupt(call: Callable[[], Any]) -> Any:
    """A fault: one bit of the last slot of the chunk that is read is wrong. Nothing tells."""
    return _damaged(call(), lambda stored: torch.cat([stored[:-1], stored[-1:] ^ 1]))


def short(call: Callable[[], Any]) -> Any:
    """A fault: the last slot of the chunk that is read has a byte less. Nothing tells."""
    return _damaged(call(), lambda stored: stored[:-1].clone())


def _damaged(chunk: Chunk | None, damage: Callable[[torch.Tensor], torch.Tensor]) -> Chunk | None:
    if chunk is None or not chunk.payload:
        return chunk
    last, stored = list(chunk.payload.items())[-1]
    return Chunk(chunk.header, {**chunk.payload, last: damage(stored)})


class FaultyTier(WrapperTier):
    """`tier` with planned faults.

    Args:
        plan: by method name, what happens to its calls one after the other; `None` is no fault, and
            none follow when a plan is at its end. `FaultyTier(tier, {"read": [None, corrupt]})`,
            `FaultyTier(tier, {"write": itertools.repeat(fail(TierTimeout("slow")))})`.

    Raises:
        UsageError: a plan for a method that there is not.
    """

    def __init__(
        self, tier: Tier, plan: Mapping[str, Iterable[Fault | None]], *, name: str | None = None
    ) -> None:
        super().__init__(tier, name=name)
        unknown = plan.keys() - _OPERATIONS
        if unknown:
            raise UsageError(f"faults for {sorted(unknown)}; allowed: {', '.join(sorted(_OPERATIONS))}")
        self.in_memory = False  # type: ignore[misc]
        self._plan = {operation: iter(faults) for operation, faults in plan.items()}
        self._lock = threading.Lock()

    def _around(self, call: Call[T]) -> T:
        with self._lock:
            fault = next(self._plan.get(call.operation, iter(())), None)
        answer: T = fault(call.run) if fault else call.run()
        return answer


_OPERATIONS = {"head", "leading", "read", "write", "delete", "keys", "usage", "pin", "unpin"}
_OPERATIONS |= {"records", "evict", "quarantine", "put_report", "reports", "fold_reports"}
_NEVER_A_MISS = {"write", "evict", "quarantine", "put_report", "reports", "fold_reports"}


@dataclass(frozen=True, slots=True)
class OperationStats:
    """What has happened to one kind of call.

    Attributes:
        calls: answered and failed.
        misses: answers `None`, `False` or an empty list.
        errors: calls that raised from the error tree.
        nbytes: payload read, or whole objects written.
        seconds: spent in the tier, summed over threads.
    """

    calls: int = 0
    misses: int = 0
    errors: int = 0
    nbytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: OperationStats) -> OperationStats:
        return OperationStats(
            self.calls + other.calls,
            self.misses + other.misses,
            self.errors + other.errors,
            self.nbytes + other.nbytes,
            self.seconds + other.seconds,
        )


class MeteredTier(WrapperTier):
    """Counts what is asked of `tier`, and what comes of it."""

    def __init__(self, tier: Tier, *, name: str | None = None) -> None:
        super().__init__(tier, name=name)
        self._stats: defaultdict[str, OperationStats] = defaultdict(OperationStats)
        self._lock = threading.Lock()

    def snapshot(self) -> dict[str, OperationStats]:
        """By method name, since the tier was wrapped; methods that were never called are not in it."""
        with self._lock:
            return dict(self._stats)

    def _around(self, call: Call[T]) -> T:
        start = time.perf_counter()
        try:
            result = call.run()
        except StorageError:
            self._add(call.operation, OperationStats(1, errors=1, seconds=time.perf_counter() - start))
            raise
        seconds = time.perf_counter() - start
        missed = not result and call.operation not in _NEVER_A_MISS
        nbytes = result.nbytes if isinstance(result, Chunk) else call.sent
        self._add(call.operation, OperationStats(1, int(missed), 0, nbytes, seconds))
        return result

    def _add(self, operation: str, more: OperationStats) -> None:
        with self._lock:
            self._stats[operation] += more
