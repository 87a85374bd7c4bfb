"""The contract of a tier.

A tier keeps whole chunks and gives back the slots that are asked for. A miss is `None`; a failure
raises from `droidspeak.errors.StorageError`. Life of a chunk in a tier:

    write(chunk)                 all or nothing; replaces what stood under the key
    head(key), leading(keys)     is it there, how big, which E layers; no payload is read
    read(key, slots, into)       header and exactly these slots, checked
    pin(key) / unpin(key)        a pinned chunk is never evicted
    quarantine(key)              takes a corrupt object out of sight
    delete(key)
    evict(nbytes)                makes room: unpinned chunks leave, in the order of the tier's policy

A tier that outlives its process also keeps the reports of those who use it (`droidspeak.storage.reports`).

Methods may be called from any thread. Every tier passes `droidspeak.storage.testing.TierConformance`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from droidspeak.storage.keys import ChunkKey, SourceId

if TYPE_CHECKING:
    import torch

    from droidspeak.storage.container import Chunk, ChunkHeader, Slot
    from droidspeak.storage.reports import Fold
    from droidspeak.storage.selection import Selection

__all__ = ["ChunkInfo", "ChunkRecord", "SlotBytes", "Tier", "TierUsage", "by_source"]


class SlotBytes(NamedTuple):
    """Stored bytes of a chunk's K, V and E slots. Headers, and objects of other systems, are in none."""

    k: int = 0
    v: int = 0
    e: int = 0


@dataclass(frozen=True, slots=True)
class ChunkInfo:
    """What a tier knows of a chunk without reading its payload.

    Attributes:
        nbytes: bytes of the whole object, header included.
        e_layers: layers whose E is stored.
        tier: name of the tier that holds it, where a store has several.
        salt: tag of the tenant's salt (`droidspeak.storage.keys.salt_tag`); empty for the empty salt.
        slots: bytes by kind; `None` where a tier does not know, or leaves them out of a lookup.
    """

    key: ChunkKey
    tokens: int
    nbytes: int
    e_layers: tuple[int, ...]
    codec: str = "raw"
    tier: str | None = field(default=None, compare=False)
    salt: str = ""
    slots: SlotBytes | None = field(default=None, compare=False)

    @classmethod
    def of(cls, chunk: Chunk) -> ChunkInfo:
        return cls.of_header(chunk.header)

    @classmethod
    def of_header(cls, header: ChunkHeader) -> ChunkInfo:
        """What the header says."""
        return cls(
            header.key,
            header.tokens,
            header.nbytes,
            header.e_layers,
            header.codec,
            None,
            header.labels.get("salt", ""),
            header.slot_bytes,
        )

    def held_by(self, tier: str) -> ChunkInfo:
        """The same, of the tier called `tier`."""
        return ChunkInfo(
            self.key, self.tokens, self.nbytes, self.e_layers, self.codec, tier, self.salt, self.slots
        )


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """A row of an inventory; `None` stands for what a tier does not know.

    Attributes:
        created, used: of the write and the last use, in ns since the epoch.
        hits: uses that the eviction policy remembers.
        pinned: whether it is kept from eviction.
    """

    info: ChunkInfo
    created: int | None = None
    used: int | None = None
    hits: int | None = None
    pinned: bool | None = None


@dataclass(frozen=True, slots=True)
class TierUsage:
    """What is held.

    Attributes:
        nbytes: bytes of all chunks.
        capacity: in bytes; `None` where the tier sets no bound.
        pinned: bytes that are kept from eviction; `None` where the tier does not know.
    """

    chunks: int
    nbytes: int
    capacity: int | None = None
    pinned: int | None = field(default=None, compare=False)

    def plus(self, chunks: int, nbytes: int) -> TierUsage:
        """With so much more."""
        return TierUsage(self.chunks + chunks, self.nbytes + nbytes)


@dataclass(frozen=True, slots=True)
class TierQueue:
    """Bytes that wait in front of a tier, and the most of it."""

    nbytes: int
    capacity: int


class Tier(ABC):
    """One place that keeps chunks.

    Attributes:
        in_memory: reads return views at once; deadlines and write-back are not needed.
        best_read: bytes up to which neighbouring slots are worth fetching in one request.
    """

    name: str
    in_memory: ClassVar[bool] = False
    best_read: ClassVar[int] = 1 << 20

    @abstractmethod
    def head(self, key: ChunkKey) -> ChunkInfo | None:
        """What is known of `key`, or `None`. Does not count as a use."""

    @abstractmethod
    def read(
        self,
        key: ChunkKey,
        slots: Collection[Slot] | None = None,
        into: Mapping[Slot, torch.Tensor] | None = None,
    ) -> Chunk | None:
        """The chunk with `slots` (all when `None`), checked, or `None`. Counts as a use.

        Args:
            into: decoded-size tensors the tier may read raw slots into. A hint: the payload of the
                answer says where the bytes are.

        Raises:
            ChunkCorrupt: what is stored is not what was written.
            ChunkIncomplete: the chunk was stored without one of `slots`.
            TierUnavailable, TierTimeout: the tier did not answer.
        """

    @abstractmethod
    def write(self, chunk: Chunk) -> None:
        """Stores a complete chunk, evicting unpinned ones if it must.

        Raises:
            TierFull: it does not fit, whatever is evicted.
            TierUnavailable, TierTimeout: the tier cannot be written.
        """

    @abstractmethod
    def delete(self, key: ChunkKey) -> bool:
        """Removes `key`, pinned or not; whether it was there."""

    def delete_unused(self, records: Sequence[ChunkRecord]) -> list[ChunkRecord]:
        """Removes the chunks that are still as `records` say, as far as the tier can tell: not replaced, used
        or pinned since. Which ones left."""
        return [record for record in records if self._left(record)]

    def _left(self, record: ChunkRecord) -> bool:
        info = self.head(record.info.key)
        return info is not None and info.nbytes == record.info.nbytes and self.delete(record.info.key)

    @abstractmethod
    def keys(self) -> Iterator[ChunkKey]:
        """All keys, in no order."""

    def records(self) -> Iterator[ChunkRecord]:
        """An inventory, in no order, as it is found; chunks may come and go meanwhile."""
        infos = (self.head(key) for key in self.keys())
        return (ChunkRecord(info.held_by(info.tier or self.name)) for info in infos if info)

    def select(self, selection: Selection) -> Iterator[ChunkRecord]:
        """The records that `selection` asks for, in its order. A tier with an index need not look at all."""
        return selection.of(self.records())

    def sources(self) -> dict[SourceId, TierUsage]:
        """Chunks and bytes per source model; where several tiers hold a chunk, it counts in each."""
        return by_source((record.info.key.source, record.info.nbytes) for record in self.records())

    def slot_bytes(self) -> dict[SourceId, SlotBytes]:
        """Bytes per source model and kind, as far as they are known. May look at every chunk."""
        found: dict[SourceId, SlotBytes] = {}
        for info in (record.info for record in self.records()):
            sums = zip(found.get(info.key.source, SlotBytes()), info.slots or SlotBytes(), strict=True)
            found[info.key.source] = SlotBytes(*map(sum, sums))
        return found

    @abstractmethod
    def usage(self) -> TierUsage:
        """What is held now."""

    def by_tier(self) -> dict[str, TierUsage]:
        """What is held now, by the name of the tier, where there is more than this one."""
        return {self.name: self.usage()}

    def evicted(self) -> TierUsage:
        """What has left to make room, by this object's doing, since it was made. Costs nothing."""
        return TierUsage(0, 0)

    def leading(self, keys: Sequence[ChunkKey]) -> list[ChunkInfo]:
        """Infos of the longest run of `keys`, from the first, that is held without a gap."""
        found = []
        for key in keys:
            info = self.head(key)
            if info is None:
                break
            found.append(info)
        return found

    def pin(self, key: ChunkKey) -> bool:
        """Keeps `key` from eviction; whether it is there. Tiers that never evict have nothing to do."""
        return self.head(key) is not None

    def unpin(self, key: ChunkKey) -> bool:
        """Allows eviction of `key` again; whether it is there."""
        return self.head(key) is not None

    def evict(self, nbytes: int) -> int:  # noqa: ARG002
        """Evicts unpinned chunks, in the order of its policy, until at least `nbytes` are freed.

        Tiers that never evict free nothing.

        Returns:
            Bytes freed; fewer than `nbytes` when no unpinned chunk is left.

        Raises:
            TierUnavailable, TierTimeout: the tier cannot be changed.
        """
        return 0

    def quarantine(self, key: ChunkKey) -> None:
        """Takes the corrupt object of `key` out of sight."""
        self.delete(key)

    def put_report(self, name: str, data: bytes) -> bool:  # noqa: ARG002
        """Keeps a report, in place of an older one of the name; whether this tier keeps reports at all.

        Raises:
            UsageError: a name or a size that is not allowed.
            TierFull, TierUnavailable, TierTimeout: it was not kept.
        """
        return False

    def reports(self) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the reports that are kept. Raises `TierUnavailable`, `TierTimeout`."""
        return iter(())

    def fold_reports(self, fold: Fold) -> None:
        """Lets `fold` make many reports one; if another process does so at this time, it may do nothing.

        A tier whose reports others fold does nothing. Raises `TierUnavailable`, `TierTimeout`.
        """

    def close(self) -> None:
        """Releases what the tier holds open. Calling it twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


def by_source(chunks: Iterable[tuple[SourceId, int]]) -> dict[SourceId, TierUsage]:
    """Sums over chunks, each given by its source and its bytes."""
    sums: defaultdict[SourceId, list[int]] = defaultdict(lambda: [0, 0])
    for source, nbytes in chunks:
        held = sums[source]
        held[0] += 1
        held[1] += nbytes
    return {source: TierUsage(*held) for source, held in sums.items()}
