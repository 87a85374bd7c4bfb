"""Our store as a remote storage plug-in of LMCache's engine (`remote_storage_plugins`, `plugin://`).

LMCache wraps it in its `RemoteBackend`, which has no pins and turns every error into a miss. That is a
shorter prefix for whole chunks. For layers (`use_layerwise`) it would be wrong KV, so a list of layers has
`None` where one cannot be read: the engine then raises instead of counting tokens that it has not got.
`storage` does the same job better.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from droidspeak.errors import ConfigError, LoadFailed
from droidspeak.integrations.lmcache_plugin.engine import (
    LAYERWISE_LOOKUP,
    ConnectorAdapter,
    ConnectorContext,
    RemoteConnector,
    allocate_in,
    buffer_bytes,
    expected_by,
    extract_plugin_type,
    warn_of_local_cpu,
)
from droidspeak.integrations.lmcache_plugin.exchange import PATIENCE, Exchange
from droidspeak.integrations.lmcache_plugin.loading import give_back
from droidspeak.integrations.lmcache_plugin.objects import layer_of
from droidspeak.integrations.lmcache_plugin.options import PluginOptions
from droidspeak.integrations.lmcache_plugin.runs import Run, leading, runs_of

__all__ = ["DroidSpeakConnector", "DroidSpeakConnectorAdapter"]

_log = logging.getLogger(__name__)
_SCHEME, _TYPE = "plugin://", "droidspeak"
# Of LMCache's timeout, after which it gives out an empty list.
_SHARE = 0.8
# Inside the connector `list` is a method of LMCache's.
Objects = list[Any]
Runs = list[Run]


class DroidSpeakConnectorAdapter(ConnectorAdapter):  # type: ignore[misc]
    """Makes the connectors of plug-ins called `droidspeak` or `droidspeak.NAME`."""

    def __init__(self) -> None:
        super().__init__(_SCHEME)

    def can_parse(self, url: str) -> bool:
        """Whether `url` is `plugin://droidspeak` or of a name of ours."""
        return url.startswith(_SCHEME) and extract_plugin_type(url.removeprefix(_SCHEME)) == _TYPE

    def create_connector(self, context: ConnectorContext) -> DroidSpeakConnector:
        """A connector.

        Raises:
            ConfigError, MissingExtra: one line; LMCache logs it and runs without us.
        """
        config, name = context.config, context.url.removeprefix(_SCHEME)
        if config.remote_serde not in (None, "naive"):
            raise ConfigError(
                f"remote_serde: {config.remote_serde}: allowed with plugin {name} is naive; see its codec"
            )
        options = PluginOptions.parse(config.extra_config, f"remote_storage_plugin.{name}.")
        warn_of_local_cpu(config)
        if config.use_layerwise:
            _log.warning("use_layerwise: storage_plugins holds what a lookup finds; plugin %s cannot", name)
        exchange = Exchange(
            options,
            expected_by(config, context.metadata),
            allocate_in(context.local_cpu_backend),
            buffer_bytes(config),
            f"LMCache remote plug-in {name}",
        )
        return DroidSpeakConnector(config, context.metadata, exchange, options.loaders)


class DroidSpeakConnector(RemoteConnector):  # type: ignore[misc]
    """One engine's connector.

    Args:
        exchange: closed with the connector.
        loaders: chunks that are read at one time.
    """

    def __init__(self, config: Any, metadata: Any, exchange: Exchange, loaders: int) -> None:
        super().__init__(config, metadata)
        self._exchange = exchange
        self._timeout = config.blocking_timeout_secs * _SHARE
        self._pool = ThreadPoolExecutor(loaders, "droidspeak remote")
        self._closed = False

    def exists_sync(self, key: Any) -> bool:
        """Whether the chunk of `key` is there, with all its layers."""
        return self.batched_contains([key]) == 1

    async def exists(self, key: Any) -> bool:
        """As `exists_sync`."""
        return await asyncio.to_thread(self.exists_sync, key)

    def support_batched_contains(self) -> bool:
        return True

    def batched_contains(self, keys: Sequence[Any]) -> int:
        """How many of `keys`, from the first, are there."""
        runs = self._runs(keys)
        return sum(run.keys for run in runs[: self._exchange.has([run.chunk for run in runs])])

    async def batched_async_contains(self, lookup_id: str, keys: Sequence[Any], pin: bool = False) -> int:  # noqa: ARG002
        """As `batched_contains`; there are no pins."""
        return await asyncio.to_thread(self.batched_contains, keys)

    async def get(self, key: Any) -> Any:
        """The memory object of `key`, or `None`."""
        return await asyncio.to_thread(self._exchange.load, key)

    def support_batched_get(self) -> bool:
        return True

    async def batched_get(self, keys: Sequence[Any]) -> Objects:
        """The memory objects of `keys`; from the first that fails on, all are `None`."""
        objects = await asyncio.to_thread(self._load, self._runs(keys))
        return objects + [None] * (len(keys) - len(objects))

    async def batched_get_non_blocking(self, lookup_id: str, keys: Sequence[Any]) -> Objects:
        """The memory objects before the first that fails, of a lookup that loads ahead.

        Of a layer: as many as `keys`, and `None` for those that fail or come too late.
        """
        if lookup_id != LAYERWISE_LOOKUP:
            return await asyncio.to_thread(self._load, self._runs(keys))
        loading = asyncio.get_running_loop().run_in_executor(None, self._load, self._runs(keys))
        try:
            objects = await asyncio.wait_for(asyncio.shield(loading), self._timeout)
        except TimeoutError:
            loading.add_done_callback(lambda late: give_back(late.result()))
            self._exchange.missed(LoadFailed("late", f"a layer was not read within {self._timeout:g} s"))
            objects = []
        return objects + [None] * (len(keys) - len(objects))

    async def put(self, key: Any, memory_obj: Any) -> None:
        """Stores a memory object; a layer may return before the rest of its chunk has come."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def told() -> None:
            loop.call_soon_threadsafe(done.set)

        self._exchange.put(key, memory_obj, told)
        if layer_of(key) is None:
            await done.wait()

    async def list(self) -> list[str]:
        """Keys of the chunks in the store, of all models."""
        keys = self._exchange.store.keys
        return await asyncio.to_thread(lambda: [str(key) for key in keys()])

    def remove_sync(self, key: Any) -> bool:
        """Removes the chunk of `key`, with all its layers; whether it was there."""
        return self._exchange.delete(key)

    def report(self) -> dict[str, Any]:
        """Counters by reason, and chunks and bytes by tier."""
        return self._exchange.report()

    async def close(self) -> None:
        """Stores what waits, and gives the store back."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._shut)

    def _shut(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._exchange.close()

    def _load(self, runs: Runs) -> Objects:
        def load(run: Run) -> Objects | None:
            try:
                return self._exchange.fetch_parts(run.chunk, run.layers, patience=PATIENCE)
            except LoadFailed as error:
                self._exchange.missed(error)
                return None

        got = leading(self._pool, load, runs, lambda _, objects: give_back(objects))
        return [memory_obj for objects in got for memory_obj in objects]

    def _runs(self, keys: Sequence[Any]) -> Runs:
        return runs_of(keys, self._exchange.chunk_key)
