"""Bytes between LMCache's memory and our store.

LMCache's memory is lent for the time of a task, and is used again as soon as the task is reported. Two
things follow.

    write   The store keeps what it is given, by reference. With a single tier that outlives the process
            the object's own memory is written, and the task is reported when that is done. In every
            other case (a memory tier, several tiers, `acknowledge: memory`) the object is copied once.
    read    The store reads straight into the object's memory. A read that misses its deadline may still
            write there, and LMCache frees the memory of a load that has been reported, whoever holds a
            reference. So the end of such a load is reported when the late read has let go (`release`).
            With `direct: false` the store reads into memory of its own, and nobody waits.

A chunk that is still waiting to be written can be read while LMCache's memory under it changes: what
was copied rather than read by a tier is checked against its checksum where it has arrived.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

import torch
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.memory_management import MemoryObj

from droidspeak.errors import (
    ChunkCorrupt,
    ChunkIncomplete,
    StorageError,
    TierFull,
    TierTimeout,
    TierUnavailable,
)
from droidspeak.integrations.lmcache_plugin.l2_config import DroidSpeakL2AdapterConfig
from droidspeak.integrations.lmcache_plugin.l2_objects import Layout, chunk_key, chunk_of, memory_of
from droidspeak.integrations.lmcache_plugin.l2_tasks import Wait
from droidspeak.storage import Chunk, ChunkHeader, ChunkKey, Slot, TieredStore

__all__ = ["Outcome", "Reason", "Transfer", "reason_of"]


class Reason(StrEnum):
    """Why an object was not stored, found, loaded or deleted."""

    MISSING = "missing"
    CORRUPT = "corrupt"
    LAYOUT = "layout"
    TIMEOUT = "timeout"
    UNAVAILABLE = "unavailable"
    FULL = "full"
    NOT_DURABLE = "not_durable"
    UNSUPPORTED = "unsupported"


_REASONS: tuple[tuple[type[Exception], Reason], ...] = (
    (ChunkCorrupt, Reason.CORRUPT),
    (ChunkIncomplete, Reason.LAYOUT),
    (TierTimeout, Reason.TIMEOUT),
    (TierFull, Reason.FULL),
    (TierUnavailable, Reason.UNAVAILABLE),
)


def reason_of(error: Exception) -> Reason:
    """The reason that `error` stands for; what is no error of the store is `unsupported`."""
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), Reason.UNSUPPORTED)


@dataclass(frozen=True)
class Outcome:
    """How a read ended.

    Attributes:
        reason: why nothing was loaded; `None` if it was.
        detail: for people.
        release: blocks until the object's memory is left alone; `None` if it is already.
    """

    reason: Reason | None = None
    detail: str = ""
    release: Wait | None = None


class _Lent(dict[Slot, torch.Tensor]):
    """Memory that is lent to a read. Whoever may still write into it keeps a reference to this."""


class Transfer:
    """Moves objects into and out of `store`."""

    def __init__(self, store: TieredStore, config: DroidSpeakL2AdapterConfig) -> None:
        self._store = store
        self._codec = config.codec
        self._direct = config.direct
        self._durable = config.acknowledge == "durable"
        alone = len(store.tiers) == 1 and not store.tiers[0].in_memory
        self._copies = not (alone and self._durable)

    def write(self, key: ObjectKey, obj: MemoryObj) -> int:
        """Gives the object to the store; its bytes, or 0 if it is there already.

        Unless it has been copied, the object's memory is in use until `settled`.

        Raises:
            StorageError, UsageError: it cannot be stored.
        """
        layout = Layout.of(obj)
        if self._has(chunk_key(key), layout):
            return 0
        memory = memory_of(obj)
        if self._copies:
            memory = memory.clone()
        self._store.write(chunk_of(key, layout, layout.views(memory), self._codec))
        return layout.nbytes

    def settled(self, key: ChunkKey, timeout: float) -> bool:
        """Waits `timeout` s until `key` is as safe as a store task promises; whether it is."""
        if not self._durable or self._store.persisted(key, timeout):
            return True
        # It must not stay behind in a queue, over memory that is LMCache's again. A write that even
        # overstays this makes a file that differs from its checksum.
        with suppress(StorageError):
            self._store.delete(key)
        return False

    def _has(self, key: ChunkKey, layout: Layout) -> bool:
        try:
            if self._store.head(key) is None:
                return False
            held = self._store.read(key, [])
        except StorageError:
            return False
        return held is not None and layout.fits(held.header)

    def read(self, key: ObjectKey, obj: MemoryObj) -> Outcome:
        """Fills the object's memory. Never raises for what is wrong with the store or the object."""
        released: queue.SimpleQueue[None] = queue.SimpleQueue()
        try:
            reason = self._fill(chunk_key(key), obj, released)
        except TierTimeout as error:
            # Whoever keeps the error (a log, say) must not keep the memory that its frames know.
            error.__traceback__ = error.__context__ = None
            return Outcome(Reason.TIMEOUT, str(error), released.get if self._direct else None)
        except (StorageError, ValueError) as error:
            return Outcome(reason_of(error), str(error))
        return Outcome(reason)

    def _fill(self, key: ChunkKey, obj: MemoryObj, released: queue.SimpleQueue[None]) -> Reason | None:
        layout = Layout.of(obj)
        if not layout.told_by_slot:
            held = self._store.read(key, [])
            if held is None:
                return Reason.MISSING
            if not layout.fits(held.header):
                return Reason.LAYOUT
        lent = _Lent(layout.views(memory_of(obj)))
        weakref.finalize(lent, released.put, None).atexit = False
        # Bytes land in `lent` only where the slot has its dtype, shape and length.
        chunk = self._store.read(key, layout.slots, lent if self._direct else None)
        if chunk is None:
            return Reason.MISSING
        if not layout.fits(chunk.header):
            return Reason.LAYOUT
        try:
            _bring(chunk, lent)
        except ChunkCorrupt:
            # A tier that checks would have done it: or it is found again and again, and never replaced.
            with suppress(StorageError):
                self._store.quarantine(key)
            raise
        return None


def _bring(chunk: Chunk, lent: Mapping[Slot, torch.Tensor]) -> None:
    """Copies into `lent` what is not there yet. Raises `ChunkCorrupt`."""
    for slot, target in lent.items():
        if chunk.payload[slot].data_ptr() == target.data_ptr():
            continue
        chunk.tensor(slot, out=target)
        _check(chunk.header, slot, target)


def _check(header: ChunkHeader, slot: Slot, target: torch.Tensor) -> None:
    record = header.records[slot]
    if record.codec == "raw":
        header.check(record, target.reshape(-1).view(torch.uint8).numpy().data)
