"""Our store as a storage plug-in of LMCache's engine (`storage_plugins`).

    lookup (pinned)    how much of the prefix is there; each chunk is read, checked and held
    retrieve           held objects are handed over; others are read now
    unpin              the hold ends
    put                in the background; a chunk of layers appears when all its layers have come

LMCache 0.5.6 cannot take a lookup back: vLLM counts its answer as computed. With `use_layerwise` a load
that fails afterwards is either not noticed, which is wrong KV, or an exception, which ends vLLM's engine.
So a lookup says yes to what is in hand. With `check: load` it says yes to what the store lists, and a
layer that then cannot be read raises `LoadFailed`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from droidspeak.errors import LoadFailed
from droidspeak.integrations.lmcache_plugin.engine import (
    LAYERWISE_LOOKUP,
    StoragePluginInterface,
    allocate_in,
    buffer_bytes,
    expected_by,
    warn_of_local_cpu,
)
from droidspeak.integrations.lmcache_plugin.exchange import PATIENCE, Exchange
from droidspeak.integrations.lmcache_plugin.holds import Holds
from droidspeak.integrations.lmcache_plugin.loading import give_back
from droidspeak.integrations.lmcache_plugin.objects import layer_of
from droidspeak.integrations.lmcache_plugin.options import PluginOptions, name_of_plugin
from droidspeak.integrations.lmcache_plugin.pins import Pins
from droidspeak.integrations.lmcache_plugin.runs import Run, leading, runs_of

__all__ = ["DroidSpeakStorage"]

_KIND = "storage_plugin"
# Of LMCache's lookup timeout: the rest is for what else the lookup does.
_LOOKUP_SHARE = 0.8


class DroidSpeakStorage(StoragePluginInterface):  # type: ignore[misc]
    """The plug-in; LMCache makes one for each engine.

    Args:
        config: LMCache's; our options are in its `extra_config` (`options.PluginOptions`).
        metadata: of the engine: model, ranks, shape and dtype of the KV.
        local_cpu_backend: allocates; `None` in vLLM's scheduler, which then only lists.

    Raises:
        ConfigError, MissingExtra: one line; LMCache logs it and runs without us.
    """

    def __init__(
        self,
        dst_device: str = "cpu",
        config: Any = None,
        metadata: Any = None,
        local_cpu_backend: Any = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(dst_device, config, metadata, local_cpu_backend, loop)
        name = name_of_plugin(config.extra_config, _KIND, (__name__, type(self).__name__))
        options = PluginOptions.parse(config.extra_config, f"{_KIND}.{name}.")
        warn_of_local_cpu(config)
        self._name = name
        self._exchange = Exchange(
            options,
            expected_by(config, metadata),
            allocate_in(local_cpu_backend),
            buffer_bytes(config),
            f"LMCache plug-in {name}",
        )
        self._layers = int(metadata.kv_shape[0])
        self._holding = options.check == "lookup" and local_cpu_backend is not None
        self._holds = Holds(config.pin_timeout_sec)
        self._pins = Pins(self._exchange.store)
        lookup_timeout = config.lookup_timeout_ms / 1000 * _LOOKUP_SHARE
        self._deadline = min(options.load_deadline, lookup_timeout or options.load_deadline)
        self._pool = ThreadPoolExecutor(options.loaders, f"droidspeak {name}")
        self._closed = False

    def __str__(self) -> str:
        return self._name

    # Lookup

    def contains(self, key: Any, pin: bool = False) -> bool:
        """Whether the chunk of `key` is there, with all its layers."""
        return self.batched_contains([key], pin) == 1

    def batched_contains(self, keys: Sequence[Any], pin: bool = False) -> int:
        """How many of `keys`, from the first, are there. Pins are counted by key."""
        runs = self._runs(keys)
        if pin and self._holding:
            found = len(self._hold(runs))
        else:
            found = self._listed(runs)
            if pin and self.local_cpu_backend is not None:
                found = self._pinned(runs[:found])
        return sum(run.keys for run in runs[:found])

    async def batched_async_contains(self, lookup_id: str, keys: Sequence[Any], pin: bool = False) -> int:  # noqa: ARG002
        """As `batched_contains`, of a lookup that loads at once what it finds: nothing is pinned."""
        runs = self._runs(keys)
        found = await asyncio.get_running_loop().run_in_executor(self._pool, self._listed, runs)
        return sum(run.keys for run in runs[:found])

    def _listed(self, runs: Sequence[Run]) -> int:
        chunks = [run.chunk for run in runs]
        return self._exchange.has(chunks, self._holds.among(chunks))

    def _hold(self, runs: Sequence[Run]) -> list[bool]:
        self._holds.sweep()
        end = time.monotonic() + self._deadline

        def hold(run: Run) -> bool | None:
            return self._hold_one(run, end) or None

        listed = runs[: self._listed(runs)]
        return leading(self._pool, hold, listed, lambda run, _: self._unpin(run))

    def _hold_one(self, run: Run, end: float) -> bool:
        if self._holds.pin(run.chunk, run.keys):
            return True
        layers = None if run.layers is None else range(self._layers)
        try:
            if time.monotonic() >= end:
                raise LoadFailed("late", f"chunk {run.chunk}: the lookup's time is over")
            objects = self._exchange.fetch_parts(run.chunk, layers)
        except LoadFailed as error:
            self._exchange.missed(error)
            return False
        self._holds.add(run.chunk, objects, run.keys)
        return True

    def _pinned(self, runs: Sequence[Run]) -> int:
        return next((n for n, run in enumerate(runs) if not self._pins.pin(run.chunk, run.keys)), len(runs))

    def pin(self, key: Any) -> bool:
        """As `contains` with `pin`."""
        return self.contains(key, pin=True)

    def unpin(self, key: Any) -> bool:
        """Takes one pin back; whether `key` was pinned."""
        return self._unpin(Run(self._exchange.chunk_key(key), None))

    def _unpin(self, run: Run) -> bool:
        return self._holds.unpin(run.chunk, run.keys) or self._pins.unpin(run.chunk, run.keys)

    def touch_cache(self) -> None:
        """Nothing to do: a read counts as a use."""

    # Retrieve

    def get_blocking(self, key: Any) -> Any:
        """The memory object of `key`, or `None`.

        Raises:
            LoadFailed: of a layer that is there and cannot be used.
        """
        layer = layer_of(key)
        held = self._holds.take(self._exchange.chunk_key(key), [layer or 0])
        if held:
            return held[0]
        if layer is None:
            return self._exchange.load(key)
        try:
            return self._exchange.fetch(key)
        except LoadFailed as error:
            self._exchange.missed(error)
            if error.reason == "absent":
                return None
            raise

    def batched_get_blocking(self, keys: Sequence[Any]) -> list[Any]:
        """The memory objects of `keys`; from the first that fails on, all are `None`."""
        objects = self._load_ahead(self._runs(keys))
        return objects + [None] * (len(keys) - len(objects))

    async def batched_get_non_blocking(
        self,
        lookup_id: str,
        keys: Sequence[Any],
        transfer_spec: Any = None,  # noqa: ARG002
    ) -> list[Any]:
        """The memory objects of one layer, or of a lookup that loads ahead.

        Raises:
            LoadFailed: one of a layer's cannot be used. A lookup gets those before the first that fails.
        """
        runs = self._runs(keys)
        load = self._load_layer if lookup_id == LAYERWISE_LOOKUP else self._load_ahead
        return await asyncio.get_running_loop().run_in_executor(None, load, runs)

    def _load_layer(self, runs: Sequence[Run]) -> list[Any]:
        failures: list[LoadFailed] = []
        objects = self._load_ahead(runs, failures)
        if failures:
            give_back(objects)
            raise failures[0]
        return objects

    def _load_ahead(self, runs: Sequence[Run], failures: list[LoadFailed] | None = None) -> list[Any]:
        def load(run: Run) -> list[Any] | None:
            return self._loaded(run, [] if failures is None else failures)

        got = leading(self._pool, load, runs, lambda _, objects: give_back(objects))
        return [memory_obj for objects in got for memory_obj in objects]

    def _loaded(self, run: Run, failures: list[LoadFailed]) -> list[Any] | None:
        if held := self._holds.take(run.chunk, run.places):
            return held
        try:
            return self._exchange.fetch_parts(run.chunk, run.layers, patience=PATIENCE)
        except LoadFailed as error:
            self._exchange.missed(error)
            # Without its traceback, whose frames would keep memory of LMCache's.
            failures.append(LoadFailed(error.reason, str(error)))
            return None

    # Put

    def exists_in_put_tasks(self, key: Any) -> bool:
        """Whether a put of `key` has begun and not ended."""
        return self._exchange.putting(key)

    def batched_submit_put_task(
        self,
        keys: Sequence[Any],
        objs: Sequence[Any],
        transfer_spec: Any = None,  # noqa: ARG002
        on_complete_callback: Callable[[Any], None] | None = None,
    ) -> None:
        """Begins to store; returns at once.

        Args:
            on_complete_callback: told each key when its chunk is done with, stored or not.
        """
        for key, memory_obj in zip(keys, objs, strict=True):
            self._exchange.put(key, memory_obj, _telling(on_complete_callback, key))

    # The rest

    def remove(self, key: Any, force: bool = True) -> bool:  # noqa: ARG002
        """Removes the chunk of `key`, with all its layers; whether it was there."""
        return self._exchange.delete(key)

    def get_allocator_backend(self) -> Any:
        """LMCache's host memory."""
        return self.local_cpu_backend

    def flush(self, timeout: float) -> bool:
        """Waits until all that has come as a whole is stored; whether that came within `timeout` s."""
        return self._exchange.flush(timeout) and self._exchange.store.flush(timeout)

    def report(self) -> dict[str, Any]:
        """Counters by reason, chunks and bytes by tier, and what is pinned."""
        return {**self._exchange.report(), "held": len(self._holds), "pinned": len(self._pins)}

    def close(self) -> None:
        """Stores what waits, takes all pins back, and gives the store back."""
        if self._closed:
            return
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._holds.clear()
        self._pins.clear()
        self._exchange.close()

    def _runs(self, keys: Iterable[Any]) -> list[Run]:
        return runs_of(keys, self._exchange.chunk_key)


def _telling(callback: Callable[[Any], None] | None, key: Any) -> Callable[[], None] | None:
    return None if callback is None else lambda: callback(key)
