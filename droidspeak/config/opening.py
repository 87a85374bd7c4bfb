"""Stores for engines' plug-ins: described by free-form options, one per configuration and process.

    store = open_store_from({"tiers": ["cpu://?capacity=1GiB"]})      opens, or joins
    release_store(store)                                              closes after the last user

A process can hold many plug-ins (one per engine, or one per kind). Those of one configuration share
tiers, so that memory is bounded once and a chunk is read once.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from droidspeak.config.settings import Settings, load_settings, open_store
from droidspeak.errors import ConfigError

if TYPE_CHECKING:
    from droidspeak.storage.tiered import TieredStore

__all__ = ["open_store_from", "release_store", "settings_from"]

_STORE_FIELDS = {"tiers", "promote", "write_queue", "limits"}


@dataclass
class _Opened:
    store: TieredStore
    users: int = 1


_LOCK = threading.Lock()
_OPENED: dict[str, _Opened] = {}


def settings_from(options: Mapping[str, Any]) -> Settings:
    """The settings that `options` describe.

    Args:
        options: `config` names a YAML file, every other key is one of `droidspeak.config.Settings` and
            wins over it.

    Raises:
        ConfigError: one line that names the key and what is allowed.
    """
    values = dict(options)
    file = values.pop("config", None)
    if file is not None and not isinstance(file, str):
        raise ConfigError(f"configuration key 'config': allowed is the path of a YAML file, not {file!r}")
    return load_settings(file, values)


def open_store_from(options: Mapping[str, Any]) -> TieredStore:
    """The process's store for `options`, opened by the first who asks.

    Every call is matched by one `release_store`; users do not close it themselves.

    Args:
        options: as of `settings_from`.

    Raises:
        ConfigError, MissingExtra: as `droidspeak.config.open_store`.
    """
    settings = settings_from(options)
    name = settings.model_dump_json(include=_STORE_FIELDS)
    with _LOCK:
        opened = _OPENED.get(name)
        if opened:
            opened.users += 1
        else:
            opened = _OPENED[name] = _Opened(open_store(settings))
        return opened.store


def release_store(store: TieredStore) -> None:
    """Gives back what `open_store_from` gave; the last user's call writes what waits and closes it."""
    with _LOCK:
        name = next((name for name, opened in _OPENED.items() if opened.store is store), None)
        if name is None:
            return
        _OPENED[name].users -= 1
        if _OPENED[name].users:
            return
        del _OPENED[name]
    store.close()
