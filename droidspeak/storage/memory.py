"""The memory tier: chunks as tensors on one torch device, within a bound of bytes.

What is written is kept as it is, not copied, when it lies on the device and holds no larger storage
alive; otherwise it is copied, slot by slot. Reads give views of what is held. Nothing is checked again
on read: whoever brought the chunk has checked it, and memory is trusted as it is everywhere else.

Where CUDA is there, host memory is pinned, so that copies to the GPU need no staging.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from time import time_ns

import torch

from droidspeak.errors import ChunkIncomplete, ConfigError, TierFull
from droidspeak.storage.container import Chunk, Slot
from droidspeak.storage.eviction import EvictionPolicy, MemoryLedger, get_eviction
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.tier import ChunkInfo, ChunkRecord, Tier, TierUsage

__all__ = ["MemoryTier"]


class MemoryTier(Tier):
    """Chunks in the memory of `device`.

    Args:
        capacity: bytes that may be held. A chunk that is being written is outside the bound until it
            has found its place.
        device: any torch device; payload tensors live there.
        eviction: a policy or the name of one.
        name: the device's own name by default.

    Raises:
        ConfigError: a capacity that is not positive, a device or a policy that is not there.
    """

    in_memory = True

    def __init__(
        self,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        eviction: EvictionPolicy | str = "lru",
        name: str | None = None,
    ) -> None:
        if capacity <= 0:
            raise ConfigError(f"memory tier of {capacity} bytes; allowed are positive capacities")
        self._device = _existing(device)
        self._pinned_host = self._device.type == "cpu" and torch.cuda.is_available()
        self._capacity = capacity
        self._policy = get_eviction(eviction) if isinstance(eviction, str) else eviction
        self._evicted = TierUsage(0, 0)
        self._ledger = MemoryLedger()
        self._chunks: dict[ChunkKey, Chunk] = {}
        self._pins: dict[ChunkKey, int] = {}
        self._times: dict[ChunkKey, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self.name = name or str(self._device)

    @property
    def device(self) -> torch.device:
        """Where the payload lives."""
        return self._device

    def head(self, key: ChunkKey) -> ChunkInfo | None:
        with self._lock:
            chunk = self._chunks.get(key)
        return ChunkInfo.of(chunk) if chunk else None

    def leading(self, keys: Sequence[ChunkKey]) -> list[ChunkInfo]:
        with self._lock:
            run = list(takewhile(bool, map(self._chunks.get, keys)))
        return [ChunkInfo.of(chunk) for chunk in run if chunk]

    def read(
        self,
        key: ChunkKey,
        slots: Collection[Slot] | None = None,
        into: Mapping[Slot, torch.Tensor] | None = None,  # noqa: ARG002 - views beat a copy
    ) -> Chunk | None:
        with self._lock:
            chunk = self._chunks.get(key)
            self._policy.touch(self._ledger, key)
            if chunk is not None:
                self._times[key] = self._times[key][0], time_ns()
        if chunk is None or slots is None:
            return chunk
        records = chunk.header.select(slots)
        return Chunk(chunk.header, {record.slot: chunk.payload[record.slot] for record in records})

    def write(self, chunk: Chunk) -> None:
        """Keeps `chunk`, or a copy of it; its tensors must not change afterwards.

        Raises:
            ChunkIncomplete: slots are missing.
            TierFull: it does not fit, whatever is evicted; what was held is still held.
        """
        if not chunk.complete:
            raise ChunkIncomplete(f"chunk {chunk.key} has {len(chunk.payload)} of its slots")
        nbytes = self.footprint(chunk)
        with self._lock:
            self._check_room(chunk.key, nbytes)
        held = chunk if self._may_keep(chunk) else self._copy(chunk)
        with self._lock:
            self._check_room(chunk.key, nbytes)
            self._admit(held, nbytes)

    def footprint(self, chunk: Chunk) -> int:
        """Bytes of the capacity that `chunk` takes."""
        if not self._pinned_host:
            return chunk.header.nbytes
        # torch's pinned allocator rounds each block up to a power of two.
        return chunk.header.data_start + sum(_power_of_two(s.numel()) for s in chunk.payload.values())

    def delete(self, key: ChunkKey) -> bool:
        with self._lock:
            return self._remove(key)

    def keys(self) -> Iterator[ChunkKey]:
        with self._lock:
            return iter(list(self._chunks))

    def records(self) -> Iterator[ChunkRecord]:
        return filter(None, map(self._record, self.keys()))

    def _record(self, key: ChunkKey) -> ChunkRecord | None:
        with self._lock:
            chunk, entry = self._chunks.get(key), self._ledger.get(key)
            if chunk is None or entry is None:
                return None
            info = ChunkInfo.of(chunk).held_by(self.name)
            return ChunkRecord(info, *self._times[key], entry.hits, entry.pinned)

    def usage(self) -> TierUsage:
        with self._lock:
            pinned = sum(self._pins.values())
            return TierUsage(len(self._chunks), self._ledger.nbytes(), self._capacity, pinned)

    def evicted(self) -> TierUsage:
        return self._evicted

    def pin(self, key: ChunkKey) -> bool:
        return self._set_pinned(key, True)

    def unpin(self, key: ChunkKey) -> bool:
        return self._set_pinned(key, False)

    def evict(self, nbytes: int) -> int:
        with self._lock:
            return self._free(nbytes)

    def close(self) -> None:
        """Lets go of everything."""
        with self._lock:
            for key in list(self._chunks):
                self._remove(key)

    # Room; the caller holds the lock

    def _check_room(self, key: ChunkKey, nbytes: int) -> None:
        pinned = sum(self._pins.values()) - self._pins.get(key, 0)
        if pinned + nbytes > self._capacity:
            raise TierFull(
                f"tier {self.name}: chunk of {nbytes} bytes, {self._capacity} bytes of room, {pinned} pinned"
            )

    def _admit(self, chunk: Chunk, nbytes: int) -> None:
        pinned = chunk.key in self._pins
        self._remove(chunk.key)
        self._free(self._ledger.nbytes() + nbytes - self._capacity)
        self._policy.admit(self._ledger, chunk.key, nbytes)
        self._chunks[chunk.key] = chunk
        now = time_ns()
        self._times[chunk.key] = now, now
        if pinned:
            self._mark(chunk.key, True)

    def _free(self, nbytes: int) -> int:
        freed = 0
        while freed < nbytes and (victim := self._policy.victim(self._ledger)):
            self._remove(victim.key)
            freed += victim.nbytes
            self._evicted = self._evicted.plus(1, victim.nbytes)
        return freed

    def _remove(self, key: ChunkKey) -> bool:
        self._ledger.remove(key)
        self._pins.pop(key, None)
        self._times.pop(key, None)
        return self._chunks.pop(key, None) is not None

    def _set_pinned(self, key: ChunkKey, pinned: bool) -> bool:
        with self._lock:
            if key not in self._chunks:
                return False
            self._mark(key, pinned)
            return True

    def _mark(self, key: ChunkKey, pinned: bool) -> None:
        self._ledger.set_pinned(key, pinned)
        entry = self._ledger.get(key)
        if pinned and entry:
            self._pins[key] = entry.nbytes
        else:
            self._pins.pop(key, None)

    # Placing

    def _may_keep(self, chunk: Chunk) -> bool:
        """Whether the chunk's own tensors can be held without holding more than is accounted for."""
        payload = chunk.payload.values()
        here = all(stored.device == self._device for stored in payload)
        pinned = not self._pinned_host or all(stored.is_pinned() for stored in payload)
        return here and pinned and _storage_bytes(payload) <= chunk.header.nbytes

    def _copy(self, chunk: Chunk) -> Chunk:
        try:
            payload = {slot: self._copy_slot(stored) for slot, stored in chunk.payload.items()}
        except torch.OutOfMemoryError as error:
            raise TierFull(f"tier {self.name}: {str(error).splitlines()[0]}") from None
        if self._device.type == "cuda":
            # Readers use their own streams and must find the bytes there.
            torch.cuda.current_stream(self._device).synchronize()
        return Chunk(chunk.header, payload)

    def _copy_slot(self, stored: torch.Tensor) -> torch.Tensor:
        held = torch.empty(
            stored.numel(), dtype=torch.uint8, device=self._device, pin_memory=self._pinned_host
        )
        return held.copy_(stored)


def _existing(device: torch.device | str) -> torch.device:
    """`device` with its index, if it is there. Raises `ConfigError`."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # a CPU build of torch asserts
        raise ConfigError(f"no device {device}: {str(error).splitlines()[0]}") from None


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that `tensors` keep alive: of their storages, each counted once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def _power_of_two(nbytes: int) -> int:
    return 1 << max(nbytes - 1, 0).bit_length()
