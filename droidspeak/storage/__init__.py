"""Storage: bytes, keys and tiers. Knows no model, no engine, no policy.

The names are imported when they are first used: who looks at keys and catalogs only, as the command line
does, is spared the seconds that torch takes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from droidspeak.storage.codecs import Codec
    from droidspeak.storage.container import Chunk, ChunkHeader, Slot, SlotKind
    from droidspeak.storage.counters import Counters
    from droidspeak.storage.guard import Limits
    from droidspeak.storage.identity import (
        Architecture,
        Mismatch,
        SourceManifest,
        cache_folder,
        require_compatible,
    )
    from droidspeak.storage.keys import DEFAULT_CHUNK_SIZE, ChunkKey, PrefixHasher, SourceId
    from droidspeak.storage.tier import ChunkInfo, Tier, TierUsage
    from droidspeak.storage.tiered import TieredStore, WriteBackOptions

__all__ = [
    "DEFAULT_CHUNK_SIZE",
    "Architecture",
    "Chunk",
    "ChunkHeader",
    "ChunkInfo",
    "ChunkKey",
    "Codec",
    "Counters",
    "Limits",
    "Mismatch",
    "PrefixHasher",
    "Slot",
    "SlotKind",
    "SourceId",
    "SourceManifest",
    "Tier",
    "TierUsage",
    "TieredStore",
    "WriteBackOptions",
    "cache_folder",
    "require_compatible",
]

_PLACES = {
    "codecs": ("Codec",),
    "container": ("Chunk", "ChunkHeader", "Slot", "SlotKind"),
    "counters": ("Counters",),
    "digests": ("cache_folder",),
    "guard": ("Limits",),
    "identity": ("Architecture", "Mismatch", "SourceManifest", "require_compatible"),
    "keys": ("DEFAULT_CHUNK_SIZE", "ChunkKey", "PrefixHasher", "SourceId"),
    "tier": ("ChunkInfo", "Tier", "TierUsage"),
    "tiered": ("TieredStore", "WriteBackOptions"),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
