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

Methods may be called from any thread. Every tier passes `droidspeak.storage.testing.TierConformance`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import ClassVar, Self

import torch

from droidspeak.storage.container import Chunk, Slot
from droidspeak.storage.keys import ChunkKey

__all__ = ["ChunkInfo", "ChunkRecord", "Tier", "TierUsage"]


@dataclass(frozen=True, slots=True)
class ChunkInfo:
    """What a tier knows of a chunk without reading its payload.

    Attributes:
        nbytes: bytes of the whole object, header included.
        e_layers: layers whose E is stored.
        tier: name of the tier that holds it, where a store has several.
    """

    key: ChunkKey
    tokens: int
    nbytes: int
    e_layers: tuple[int, ...]
    codec: str = "raw"
    tier: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, chunk: Chunk) -> ChunkInfo:
        header = chunk.header
        return cls(header.key, header.tokens, header.nbytes, header.e_layers, header.codec)

    def held_by(self, tier: str) -> ChunkInfo:
        """The same, of the tier called `tier`."""
        return ChunkInfo(self.key, self.tokens, self.nbytes, self.e_layers, self.codec, tier)


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
    """Chunks and bytes held; `capacity` in bytes, `None` where the tier sets no bound."""

    chunks: int
    nbytes: int
    capacity: int | None = None


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

    @abstractmethod
    def keys(self) -> Iterator[ChunkKey]:
        """All keys, in no order."""

    def records(self) -> Iterator[ChunkRecord]:
        """An inventory, in no order, as it is found; chunks may come and go meanwhile."""
        infos = (self.head(key) for key in self.keys())
        return (ChunkRecord(info) for info in infos if info)

    @abstractmethod
    def usage(self) -> TierUsage:
        """What is held now."""

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
