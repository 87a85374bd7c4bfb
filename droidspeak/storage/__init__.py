"""Storage: bytes, keys and tiers. Knows no model, no engine, no policy."""

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
