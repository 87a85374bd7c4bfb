"""Between LMCache's memory objects and our store; both in-process plug-ins stand on this.

put     see `putting`
has     how many of the leading keys are there; a chunk of layers is there as a whole or not at all
load    see `loading`
delete, report, close
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any

from droidspeak.config.opening import open_store_from, release_store
from droidspeak.errors import LoadFailed, StorageError
from droidspeak.integrations.lmcache_plugin.loading import Allocate, Loading
from droidspeak.integrations.lmcache_plugin.objects import Expected, Layout, Naming, layer_of
from droidspeak.integrations.lmcache_plugin.options import PluginOptions
from droidspeak.integrations.lmcache_plugin.putting import Bounds, Putting
from droidspeak.integrations.lmcache_plugin.tally import Tally, reason_of
from droidspeak.storage import ChunkInfo, ChunkKey

__all__ = ["PATIENCE", "Exchange"]

_SETTLE_TIMEOUT = 5.0
# Seconds that a load waits for room in the buffer; a lookup does not wait.
PATIENCE = 1.0
_PAUSE = 0.01


class Exchange:
    """Puts and loads of one engine.

    Args:
        options: of the plug-in.
        expected: the layouts that the engine can use.
        allocate: a memory object of a layout with one reference, or `None`, at once.
        capacity: bytes of the engine's buffer.
        name: for log lines.

    Attributes:
        tally: `hits`, `stored`, and `misses`, `not_stored`, `not_deleted` by reason.

    Raises:
        ConfigError, MissingExtra: as `open_store_from`.
    """

    def __init__(
        self, options: PluginOptions, expected: Expected, allocate: Allocate, capacity: int, name: str
    ) -> None:
        shape = expected.metadata.kv_shape
        self._naming = Naming((*shape[:2], *shape[3:]), options.identity, options.salt)
        self._allocate = allocate
        bounds = Bounds(
            queue=capacity // 2,
            assembly=capacity * 3 // 4 if options.assembly_capacity is None else options.assembly_capacity,
            assembly_timeout=options.assembly_timeout,
        )
        self.tally = Tally(name)
        self.store = open_store_from(options.store)
        self._putting = Putting(self.store, self.tally, options.codec, expected.layers, bounds)
        self._loading = Loading(self.store, self.tally, expected)

    def chunk_key(self, key: Any) -> ChunkKey:
        """See `Naming.chunk_key`."""
        return self._naming.chunk_key(key)

    def put(self, key: Any, memory_obj: Any, told: Callable[[], None] | None = None) -> None:
        """Begins to store a memory object; `told` is called when its chunk is done with, well or not."""
        self._putting.put(self.chunk_key(key), key, memory_obj, told)

    def putting(self, key: Any) -> bool:
        """Whether a put of `key` has begun and not ended."""
        return self._putting.under_way(self.chunk_key(key), layer_of(key))

    def settle(self, key: Any, timeout: float = _SETTLE_TIMEOUT) -> bool:
        """Waits until the chunk of `key` is written, if all of it has come."""
        return self._putting.settle(self.chunk_key(key), timeout)

    def flush(self, timeout: float) -> bool:
        """Waits until all puts of complete chunks are done; whether that came within `timeout` s."""
        return self._putting.flush(timeout)

    def has(self, chunks: Sequence[ChunkKey], known: Collection[ChunkKey] = ()) -> int:
        """How many of `chunks`, from the first, are in the store, on their way into it, or `known`."""
        self._putting.sweep()
        # Taken before the store is asked: what is written in between is in both, never in neither.
        sure = self._putting.among(chunks).union(known)
        found = 0
        for here, group in groupby(chunks, key=lambda chunk: chunk in sure):
            run = list(group)
            there = len(run) if here else len(self._leading(run))
            found += there
            if there < len(run):
                break
        return found

    def load(self, key: Any) -> Any:
        """A memory object with one reference for the caller, or `None`: counted, with a reason."""
        try:
            return self.fetch(key)
        except LoadFailed as error:
            self.missed(error)
            return None

    def fetch(self, key: Any) -> Any:
        """As `load`; raises `LoadFailed`, not counted."""
        layer = layer_of(key)
        return self.fetch_parts(self.chunk_key(key), None if layer is None else [layer], patience=PATIENCE)[0]

    def fetch_parts(
        self, chunk: ChunkKey, layers: Sequence[int] | None, *, patience: float = 0.0
    ) -> list[Any]:
        """As `Loading.fetch`. `patience` is how long it waits for room in the buffer, in seconds."""
        self._putting.settle(chunk, _SETTLE_TIMEOUT)
        return self._loading.fetch(chunk, layers, lambda layout: self._allocated(layout, patience))

    def missed(self, error: LoadFailed) -> None:
        """Counts a load that has failed."""
        self.tally.failed("misses", error.reason, str(error))

    def delete(self, key: Any) -> bool:
        """Removes the chunk of `key`; whether it was there."""
        self.settle(key)
        try:
            return self.store.delete(self.chunk_key(key))
        except StorageError as error:
            self.tally.failed("not_deleted", reason_of(error), str(error))
            return False

    def report(self) -> dict[str, Any]:
        """Counters of the plug-in and of the store, and chunks and bytes by tier."""
        return {
            "plugin": self.tally.counters.snapshot(),
            "store": self.store.counters.snapshot(),
            "tiers": {
                name: {"chunks": usage.chunks, "nbytes": usage.nbytes, "capacity": usage.capacity}
                for name, usage in self.store.by_tier().items()
            },
        }

    def close(self) -> None:
        """Stores what waits, forgets incomplete chunks, and gives the store back."""
        self._putting.close()
        release_store(self.store)

    def _leading(self, chunks: Sequence[ChunkKey]) -> list[ChunkInfo]:
        try:
            return self.store.leading(chunks)
        except StorageError as error:
            self.tally.failed("misses", reason_of(error), str(error))
            return []

    def _allocated(self, layout: Layout, patience: float) -> Any:
        # LMCache's own loop for this waits without end, also for layers that will never be complete.
        end = time.monotonic() + patience
        while (memory_obj := self._allocate(layout)) is None and time.monotonic() < end:
            self._putting.sweep()
            time.sleep(_PAUSE)
        return memory_obj
