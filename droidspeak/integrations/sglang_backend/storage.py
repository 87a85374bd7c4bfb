"""Pages of SGLang's hierarchical cache, as objects in our tiers.

HiCache hands over whole pages by hash and shows neither layers nor the model, so this is a page store: exact
reuse, no plans. A page is found by the engine that could have written it only: same model name, layout,
ranks, dtype and size. SGLang's hash names the tokens, not the weights: give `identity` (the digest of the
weights, say) where a fine-tune may be put at the same path.

Source: sglang/srt/mem_cache/hicache_storage.py (`HiCacheStorage`, `HiCacheFile`) of 0.5.23.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

from droidspeak.config.opening import open_store_from, release_store
from droidspeak.errors import ConfigError, StorageError
from droidspeak.storage import ChunkKey, Counters
from droidspeak.storage.codecs import as_bytes
from droidspeak.storage.digests import canonical
from droidspeak.storage.objects import NAME_LABEL, object_chunk, object_key, object_slot

__all__ = ["DroidSpeakHiCache"]

_log = logging.getLogger(__name__)
_ORIGIN = "sglang hicache"
_PAGE = object_slot()
# SGLang's own keys in the same extra configuration.
_THEIRS = ("backend_name", "module_path", "class_name", "interface_v1")
# What of SGLang's configuration does not say how a page looks or whose it is.
_INCIDENTAL = ("enable_storage_metrics", "extra_config")


class DroidSpeakHiCache(HiCacheStorage):  # type: ignore[misc]
    """One rank's pages.

    Args:
        config: SGLang's `HiCacheStorageConfig`; its `extra_config` holds every key of
            `droidspeak.config.Settings`, `config` for a file, and `identity`.

    Attributes:
        counters: `hits`, `stored`, and `misses`, `not_stored` by reason.

    Raises:
        ConfigError, MissingExtra: one line; SGLang logs it and does not start.
    """

    def __init__(self, config: Any, _options: Any = None) -> None:
        extra = {key: value for key, value in (config.extra_config or {}).items() if key not in _THEIRS}
        identity = extra.pop("identity", "")
        if not isinstance(identity, str):
            raise ConfigError(f"configuration key 'identity': allowed is a text, not {identity!r}")
        self._owner = canonical({"identity": identity, "config": _described(config)})
        self._shard = f"{config.tp_rank}of{config.tp_size}"
        self._store = open_store_from(extra)
        self.counters = Counters()

    def exists(self, key: str) -> bool:
        """Whether the page called `key` is there."""
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:  # noqa: ARG002
        """How many of `keys`, from the first, are there."""
        try:
            return len(self._store.leading([self._key(key) for key in keys]))
        except StorageError as error:
            self._failed("misses", error)
            return 0

    def get(
        self,
        key: str,
        target_location: Any = None,
        target_sizes: Any = None,  # noqa: ARG002
    ) -> torch.Tensor | None:
        """Fills `target_location`, a tensor on the CPU, with the page; `None` if it cannot."""
        if target_location is None:
            return None
        try:
            chunk = self._store.read(self._key(key))
        except StorageError as error:
            self._failed("misses", error)
            return None
        stored = None if chunk is None else chunk.tensor(_PAGE)
        if stored is None or not _same(stored, target_location):
            self.counters.add("misses", "absent" if stored is None else "other_layout")
            return None
        # Not read into it directly: a read that outlives its deadline must not write into SGLang's memory.
        target_location.copy_(stored.view(target_location.shape))
        self.counters.add("hits")
        result: torch.Tensor = target_location
        return result

    def batch_get(
        self,
        keys: Sequence[str],
        target_locations: Any = None,
        target_sizes: Any = None,  # noqa: ARG002
    ) -> list[torch.Tensor | None]:
        """As `get`, of each; nothing is read after the first that fails, since prefixes have no gaps."""
        found: list[torch.Tensor | None] = []
        for key, target in zip(keys, target_locations or [None] * len(keys), strict=True):
            found.append(self.get(key, target) if not found or found[-1] is not None else None)
        return found

    def set(
        self,
        key: str,
        value: Any = None,
        target_location: Any = None,  # noqa: ARG002
        target_sizes: Any = None,  # noqa: ARG002
    ) -> bool:
        """Stores a copy of the tensor `value`; whether it is stored, or was."""
        name = self._key(key)
        try:
            if self._store.head(name) is None:
                # SGLang uses its page again as soon as this returns.
                parts = {0: value.detach().cpu().contiguous().clone()}
                self._store.write(object_chunk(name, parts, labels={NAME_LABEL: key}))
                self.counters.add("stored")
        except StorageError as error:
            self._failed("not_stored", error)
            return False
        return True

    def batch_set(
        self,
        keys: Sequence[str],
        values: Any = None,
        target_locations: Any = None,  # noqa: ARG002
        target_sizes: Any = None,  # noqa: ARG002
    ) -> bool:
        """As `set`, of each, until one fails."""
        return all(self.set(key, value) for key, value in zip(keys, values, strict=True))

    def clear(self) -> None:
        """Removes the pages of this engine."""
        source = self._key("").source
        for key in [key for key in self._store.keys() if key.source == source]:  # noqa: SIM118 - a tier
            try:
                self._store.delete(key)
            except StorageError as error:
                self._failed("not_deleted", error)

    def close(self) -> None:
        """Writes what waits and gives the store back."""
        release_store(self._store)

    def _key(self, name: str) -> ChunkKey:
        return object_key(_ORIGIN, self._owner, name.encode(), self._shard)

    def _failed(self, event: str, error: StorageError) -> None:
        self.counters.add(event, type(error).__name__)
        _log.debug("%s: %s", event, error)


def _described(config: Any) -> dict[str, str]:
    return {key: str(value) for key, value in asdict(config).items() if key not in _INCIDENTAL}


def _same(stored: torch.Tensor, target: torch.Tensor) -> bool:
    return stored.dtype == target.dtype and as_bytes(stored).numel() == target.numel() * target.element_size()
