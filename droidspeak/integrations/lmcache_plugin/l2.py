"""Our store as an L2 tier of LMCache's multiprocess server (`lmcache server --l2-adapter`).

    {"type": "plugin", "module_path": "droidspeak.integrations.lmcache_plugin.l2",
     "class_name": "DroidSpeakL2Adapter", "config_class_name": "DroidSpeakL2AdapterConfig",
     "adapter_params": {"tiers": ["disk:///var/cache/droidspeak?capacity=200GiB"]}}

Each hook starts a task and returns; the task's end is told by one of three event descriptors.

    store              the objects become chunks; success when they are durable (`acknowledge`)
    lookup and lock    a bit per object that is there, and a pin that keeps it there
    load               a bit per object that has arrived whole and checked in LMCache's memory
    unlock             the pin goes
    delete, list, get_usage, report_status    for eviction, quotas and people

Whatever is missing, corrupt, of another layout or late is a 0 bit with a counted reason: LMCache cuts
the prefix there, and the engine computes the rest.

Upstream: `lmcache/v1/distributed/l2_adapters/base.py` (0.5.6).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import Any

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import KeyEntry, KeyListPage, MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc, L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface
from lmcache.v1.memory_management import MemoryObj

from droidspeak.config.opening import open_store_from, release_store
from droidspeak.errors import StorageError
from droidspeak.integrations.lmcache_plugin.l2_config import DroidSpeakL2AdapterConfig
from droidspeak.integrations.lmcache_plugin.l2_listing import list_objects
from droidspeak.integrations.lmcache_plugin.l2_locks import Locks
from droidspeak.integrations.lmcache_plugin.l2_objects import chunk_key
from droidspeak.integrations.lmcache_plugin.l2_residents import Residents
from droidspeak.integrations.lmcache_plugin.l2_tasks import TaskQueue, Wait
from droidspeak.integrations.lmcache_plugin.l2_transfer import Reason, Transfer, reason_of
from droidspeak.storage import ChunkInfo, ChunkKey, Counters, TieredStore
from droidspeak.storage.breaker import BreakerState
from droidspeak.storage.guard import GuardedTier

__all__ = ["DroidSpeakL2Adapter", "DroidSpeakL2AdapterConfig"]

_log = logging.getLogger(__name__)
_RECONCILE_SECONDS = 30.0


class DroidSpeakL2Adapter(L2AdapterInterface):  # type: ignore[misc]
    """Stores LMCache's objects in our tiers.

    Args:
        config: see `DroidSpeakL2AdapterConfig`.
        l1_memory_desc: of LMCache's memory; not needed.

    Attributes:
        counters: `stored`, `present` (was there already), `found`, `absent`, `loaded`, and by reason
            `store_failed`, `lookup_failed`, `load_failed`, `delete_failed`.

    Raises:
        ConfigError, MissingExtra: tiers that are described wrongly, or whose extra is missing.
    """

    def __init__(
        self,
        config: DroidSpeakL2AdapterConfig,
        l1_memory_desc: L1MemoryDesc | None = None,  # noqa: ARG002 - LMCache passes it to every adapter
    ) -> None:
        self._store = open_store_from(config.store)
        super().__init__(max_capacity_bytes=_capacity(self._store))
        self.counters = Counters()
        self._transfer = Transfer(self._store, config)
        self._patience = config.persist_timeout
        self._locks = Locks(self._store)
        self._residents = Residents()
        self._reconciled = time.monotonic()
        ids = count()
        self._stores: TaskQueue[L2StoreResult] = TaskQueue("store", config.workers, ids)
        self._lookups: TaskQueue[Bitmap] = TaskQueue("lookup", config.workers, ids)
        self._loads: TaskQueue[Bitmap] = TaskQueue("load", config.workers, ids)
        self._closed = False

    def get_store_event_fd(self) -> int:
        return self._stores.fileno()

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._lookups.fileno()

    def get_load_event_fd(self) -> int:
        return self._loads.fileno()

    # Store

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        stored: dict[ObjectKey, int] = {}
        job = partial(self._store_objects, keys, objects, stored)
        return self._stores.submit(
            [job], lambda: L2StoreResult(len(stored) == len(set(keys)), sum(stored.values()))
        )

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        return self._stores.fetch_all()

    def _store_objects(
        self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj], stored: dict[ObjectKey, int]
    ) -> None:
        written = {}
        for key, obj in zip(keys, objects, strict=True):
            try:
                written[key] = self._transfer.write(key, obj)
            except (StorageError, ValueError) as error:
                self._count("store_failed", reason_of(error), key, error)
        end = time.monotonic() + self._patience
        for key, size in written.items():
            if not self._transfer.settled(chunk_key(key), max(0.0, end - time.monotonic())):
                self._count("store_failed", Reason.NOT_DURABLE, key)
                continue
            self.counters.add("stored" if size else "present")
            stored[key] = size
        sizes = {key: obj.get_size() for key, obj in zip(keys, objects, strict=True)}
        self._note_stored({key: sizes[key] for key in stored})

    # Lookup and lock

    def submit_lookup_and_lock_task(
        self,
        keys: list[ObjectKey],
        group_layout_descs: dict[int, MemoryLayoutDesc],  # noqa: ARG002 - the load compares layouts
    ) -> int:
        found = [False] * len(keys)
        return self._lookups.submit([partial(self._look_up, keys, found)], lambda: _bitmap(found))

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        return self._lookups.fetch(task_id)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        self._lookups.run(partial(self._unlock, keys))

    def _unlock(self, keys: Sequence[ObjectKey]) -> None:
        for key in keys:
            self._locks.unlock(chunk_key(key))

    def _look_up(self, keys: Sequence[ObjectKey], found: list[bool]) -> None:
        held = self._held([chunk_key(key) for key in keys])
        for index, (key, info) in enumerate(zip(keys, held, strict=True)):
            if info is not None:
                try:
                    found[index] = self._locks.lock(info.key)
                except StorageError as error:
                    self._count("lookup_failed", reason_of(error), key, error)
            self.counters.add("found" if found[index] else "absent")
        self._note_stored({key: info.nbytes for key, info in zip(keys, held, strict=True) if info})
        self._note_gone([key for key, hit in zip(keys, found, strict=True) if not hit])

    def _held(self, keys: Sequence[ChunkKey]) -> list[ChunkInfo | None]:
        """What the store says of each of `keys`, in as few questions as there are gaps."""
        held: list[ChunkInfo | None] = []
        try:
            while len(held) < len(keys):
                held += self._store.leading(keys[len(held) :])
                held += [None] * (len(held) < len(keys))
        except StorageError as error:
            self.counters.add("lookup_failed", reason_of(error))
        return held + [None] * (len(keys) - len(held))

    # Load

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        loaded = [False] * len(keys)
        jobs = [
            partial(self._load_object, index, key, obj, loaded)
            for index, (key, obj) in enumerate(zip(keys, objects, strict=True))
        ]
        return self._loads.submit(jobs, partial(self._end_load, keys, loaded))

    def query_load_result(self, task_id: int) -> Bitmap | None:
        return self._loads.fetch(task_id)

    def _load_object(self, index: int, key: ObjectKey, obj: MemoryObj, loaded: list[bool]) -> Wait | None:
        outcome = self._transfer.read(key, obj)
        if outcome.reason is None:
            self.counters.add("loaded")
            loaded[index] = True
        else:
            self._count("load_failed", outcome.reason, key, outcome.detail)
        if outcome.reason in (Reason.MISSING, Reason.CORRUPT):
            self._note_gone([key])
        return outcome.release

    def _end_load(self, keys: Sequence[ObjectKey], loaded: Sequence[bool]) -> Bitmap:
        arrived = [key for key, there in zip(keys, loaded, strict=True) if there]
        if arrived:
            self._notify_keys_accessed(arrived)
        return _bitmap(loaded)

    # What is there

    def delete(self, keys: list[ObjectKey]) -> None:
        """Deletes what is not locked. Blocks; never raises: LMCache's eviction thread would end."""
        gone = []
        for key in keys:
            chunk = chunk_key(key)
            if chunk in self._locks:
                continue
            try:
                self._store.delete(chunk)
                gone.append(key)
            except StorageError as error:
                self._count("delete_failed", reason_of(error), key, error)
        self._note_gone(gone)

    def list_l2_keys(
        self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None
    ) -> KeyListPage:
        """A page of the objects in the store, with their sizes in bytes.

        An object with a cache salt is listed if this process has stored or found it: salts are not
        written down.

        Raises:
            ValueError: a page size that is not positive, or a cursor that is none of ours.
            TierUnavailable, TierTimeout: the store cannot be listed.
        """
        objects, following = list_objects(self._store, self._residents, model_name, page_size, cursor)
        entries = tuple(KeyEntry(key.to_encoded_object_key(), size) for key, size in objects)
        return KeyListPage(entries, following)

    def get_usage(self) -> AdapterUsage:
        """Bytes of the objects that this process has stored or found and that are still there.

        What the store has evicted on its own is taken off within half a minute.
        """
        now = time.monotonic()
        if now - self._reconciled > _RECONCILE_SECONDS and not self._closed:
            self._reconciled = now
            self._lookups.run(self.reconcile)
        return super().get_usage()

    def reconcile(self) -> None:
        """Forgets the objects that the store no longer holds."""
        known = self._residents.chunks()
        try:
            gone = known.keys() - set(self._store.keys())
        except StorageError as error:
            _log.debug("not reconciled: %s", error)
            return
        self._note_gone([known[chunk] for chunk in gone])

    def report_status(self) -> dict[str, Any]:
        """Healthy while any tier can be read. Asks no tier anything."""
        tiers = {
            tier.name: {"reading": tier.reading.value, "writing": tier.writing.value}
            for tier in self._store.tiers
            if isinstance(tier, GuardedTier)
        }
        return {
            "is_healthy": not self._closed
            and any(tier["reading"] != BreakerState.OPEN.value for tier in tiers.values()),
            "type": type(self).__name__,
            "tiers": tiers,
            "locks": len(self._locks),
            "known_objects": len(self._residents),
            "in_flight": {
                "store": self._stores.in_flight,
                "lookup": self._lookups.in_flight,
                "load": self._loads.in_flight,
            },
            "counters": self.counters.snapshot(),
            "store_counters": self._store.counters.snapshot(),
        }

    def close(self) -> None:
        """Ends the tasks under way, fails those that wait, unlocks everything and gives back the store."""
        if self._closed:
            return
        self._closed = True
        for tasks in (self._stores, self._loads, self._lookups):
            tasks.close()
        self._locks.release_all()
        release_store(self._store)

    # Accounts

    def _note_stored(self, sizes: dict[ObjectKey, int]) -> None:
        fresh = [key for key, size in sizes.items() if self._residents.add(key, size)]
        if fresh:
            self._notify_keys_stored(fresh, [sizes[key] for key in fresh])

    def _note_gone(self, keys: Sequence[ObjectKey]) -> None:
        sizes = self._residents.remove_all(keys)
        if sizes:
            self._notify_keys_deleted(list(sizes), list(sizes.values()))

    def _count(self, what: str, reason: Reason, key: ObjectKey, detail: object = "") -> None:
        self.counters.add(what, reason)
        _log.debug("%s %s: %s %s", what, chunk_key(key), reason, detail)


def _bitmap(bits: Sequence[bool]) -> Bitmap:
    bitmap = Bitmap(len(bits))
    for index, bit in enumerate(bits):
        if bit:
            bitmap.set(index)
    return bitmap


def _capacity(store: TieredStore) -> int:
    """Bytes of the last tier, where all objects end; 0 where it has no bound."""
    usage = store.by_tier().get(store.tiers[-1].name)
    return (usage.capacity if usage else None) or 0
