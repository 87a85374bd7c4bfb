"""Storage: bytes, keys and tiers. Knows no model, no engine, no policy.

The names are imported when they are first used: who looks at keys and catalogs only, as the command line
does, is spared the seconds that torch takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from droidspeak.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "codecs": ("Codec",),
        "container": ("Chunk", "ChunkHeader", "Slot", "SlotKind"),
        "counters": ("Counters",),
        "digests": ("cache_folder",),
        "guard": ("Limits",),
        "identity": ("Architecture", "Mismatch", "SourceManifest", "require_compatible"),
        "keys": ("DEFAULT_CHUNK_SIZE", "ChunkKey", "PrefixHasher", "SourceId"),
        "tier": ("ChunkInfo", "Tier", "TierUsage"),
        "tiered": ("TieredStore", "WriteBackOptions"),
    },
)
