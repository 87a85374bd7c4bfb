"""What a plug-in is told in LMCache's `extra_config`, where its keys share a prefix.

    storage_plugin.droidspeak.module_path: droidspeak.integrations.lmcache_plugin.storage
    storage_plugin.droidspeak.tiers: [cpu://?capacity=8GiB, disk:///var/cache/kv?capacity=200GiB]

LMCache only logs what goes wrong here and runs on without us, so each error is one line that names the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from droidspeak.config.opening import settings_from
from droidspeak.errors import ConfigError, UsageError
from droidspeak.storage.urls import parse_size

__all__ = ["CHECKS", "PluginOptions", "name_of_plugin"]

CHECKS = ("lookup", "load")
_LMCACHE_OWN = ("module_path", "class_name")
_OWN = ("assembly_capacity", "assembly_timeout", "check", "identity")


@dataclass(frozen=True)
class PluginOptions:
    """The options of one plug-in.

    Attributes:
        store: of the store, for `open_store_from`.
        salt: tenant's secret; enters the key.
        codec: of what is written, `raw` or `zstd`.
        loaders: chunks that are read at one time.
        load_deadline: seconds that one lookup may take to read what it finds.
        identity: what LMCache's keys do not say of the model (weights digest, adapter); enters the key.
        check: `lookup`: what a pinned lookup finds is read, checked and kept in LMCache's buffer until it
            is unpinned. `load`: it is read when it is needed.
        assembly_capacity: bytes of layers that may wait for the rest of their chunk; `None`: three quarters
            of LMCache's buffer.
        assembly_timeout: seconds after which a chunk whose layers have not all come is forgotten.
    """

    store: Mapping[str, Any]
    salt: str
    codec: str
    loaders: int
    load_deadline: float
    identity: str = ""
    check: str = "lookup"
    assembly_capacity: int | None = None
    assembly_timeout: float = 60.0

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any] | None, prefix: str) -> PluginOptions:
        """The options whose keys in `extra_config` begin with `prefix`.

        Raises:
            ConfigError: one line that names the key and what is allowed.
        """
        found = {
            key.removeprefix(prefix): value
            for key, value in (extra_config or {}).items()
            if key.startswith(prefix)
        }
        own = {key: found.pop(key) for key in _OWN if found.get(key) is not None}
        store = {key: value for key, value in found.items() if key not in _LMCACHE_OWN}
        try:
            settings = settings_from(store)
            _check_own(own)
            if "assembly_capacity" in own:
                own["assembly_capacity"] = parse_size(own["assembly_capacity"])
        except UsageError as error:
            raise ConfigError(f"{prefix}*: {error} (and of the plug-in: {', '.join(_OWN)})") from None
        return cls(store, settings.salt, settings.codec, settings.loaders, settings.load_deadline, **own)


def name_of_plugin(extra_config: Mapping[str, Any] | None, kind: str, class_path: tuple[str, str]) -> str:
    """The name under which `extra_config` lists the class: LMCache does not tell it to the class.

    Args:
        kind: `"storage_plugin"`, say.
        class_path: module and name of the class.

    Raises:
        ConfigError: it is listed twice, or not at all.
    """
    extra, (module, name) = extra_config or {}, class_path
    names = [
        key.removeprefix(f"{kind}.").removesuffix(".class_name")
        for key, value in extra.items()
        if key.startswith(f"{kind}.") and key.endswith(".class_name") and value == name
    ]
    ours = [plugin for plugin in names if extra.get(f"{kind}.{plugin}.module_path") == module]
    if len(ours) != 1:
        listed = ", ".join(ours) or "none"
        raise ConfigError(f"{kind}.NAME.class_name: {name}: allowed is exactly one NAME, not {listed}")
    return ours[0]


def _check_own(own: Mapping[str, Any]) -> None:
    identity, check = own.get("identity", ""), own.get("check", "lookup")
    timeout = own.get("assembly_timeout", 1.0)
    if not isinstance(identity, str):
        raise ConfigError(f"configuration key 'identity': allowed is text, not {identity!r}")
    if check not in CHECKS:
        raise ConfigError(f"configuration key 'check': allowed: {', '.join(CHECKS)}, not {check!r}")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
        raise ConfigError(
            f"configuration key 'assembly_timeout': allowed are seconds above 0, not {timeout!r}"
        )
