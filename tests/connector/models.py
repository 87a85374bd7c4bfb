"""Models that are only manifests, stores that tell what was asked of them, and chunks with known content."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from droidspeak.connector.shards import Shard
from droidspeak.storage import (
    Architecture,
    Chunk,
    ChunkKey,
    PrefixHasher,
    Slot,
    SlotKind,
    SourceManifest,
)
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.wrappers import WrapperTier

SIZE = 16
LAYERS, HEADS, DIM, HIDDEN = 4, 2, 4, 8
_ARCHITECTURE = Architecture("llama", LAYERS, HEADS, DIM, HIDDEN, 1000, "rope", "full", "float32")


def model(weights: str = "a", tokenizer: str = "ids:1000", layout: str | None = None, **architecture: Any):
    """The manifest of a small model; the same for the same arguments."""
    manifest = SourceManifest(weights, replace(_ARCHITECTURE, **architecture), tokenizer)
    return manifest if layout is None else replace(manifest, layout=layout)


def prompt(chunks: int, extra: int = 1, seed: int = 0) -> list[int]:
    """Token ids of that many chunks and some more."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1000, (chunks * SIZE + extra,), generator=source).tolist()


def keys_of(source: SourceManifest, token_ids: Sequence[int], *, size: int = SIZE, salt: str = ""):
    return [ChunkKey(source.source_id, "0of1", link) for link in PrefixHasher(size, salt).hashes(token_ids)]


def rows(source: SourceManifest, slot: Slot, tokens: int) -> torch.Tensor:
    """What `source` would have computed: the first rows are the same however many there are."""
    return _all_rows(source, slot)[:tokens].clone()


@cache
def _all_rows(source: SourceManifest, slot: Slot) -> torch.Tensor:
    shape = (source.architecture.hidden_size,)
    if slot.kind is not SlotKind.E:
        shape = (source.architecture.kv_heads, source.architecture.head_dim)
    number = int(source.source_id[:8], 16) * 1000 + slot.layer * 10 + list(SlotKind).index(slot.kind)
    values = torch.randn(8 * SIZE, *shape, generator=torch.Generator().manual_seed(number))
    return values.to(getattr(torch, source.architecture.dtype))


def chunk(
    source: SourceManifest,
    key: ChunkKey,
    index: int,
    e_layers: Collection[int] = (),
    *,
    size: int = SIZE,
    codec: str = "raw",
) -> Chunk:
    """Chunk number `index` of a prompt."""
    slots = [*Slot.kv(range(LAYERS)), *(Slot(SlotKind.E, layer) for layer in e_layers)]
    cut = slice(index * size, (index + 1) * size)
    tensors = {slot: rows(source, slot, cut.stop)[cut].clone() for slot in slots}
    return Chunk.encode(key, tensors, codec=codec)


def fill(
    store,
    source: SourceManifest,
    token_ids: Sequence[int],
    e_layers: Collection[int] = (),
    *,
    only: Iterable[int] | None = None,
    size: int = SIZE,
    salt: str = "",
    codec: str = "raw",
) -> list[ChunkKey]:
    """Stores the full chunks of a prompt (those numbered in `only`); returns all their keys."""
    keys = keys_of(source, token_ids, size=size, salt=salt)
    for index in range(len(keys)) if only is None else only:
        store.write(chunk(source, keys[index], index, e_layers, size=size, codec=codec))
    return keys


def fill_split(
    store, source: SourceManifest, token_ids: Sequence[int], degree: int, e_layers: Collection[int] = ()
) -> None:
    """As `fill`, by an engine of that tensor-parallel degree."""
    for index, key in enumerate(keys_of(source, token_ids)):
        whole = chunk(source, key, index, e_layers)
        for rank in range(degree):
            heads = Shard(rank, degree).heads(source.architecture.kv_heads)
            tensors = {slot: whole.tensor(slot) for slot in whole.header.records}
            part = {
                slot: tensor if slot.kind is SlotKind.E else tensor[:, heads.start : heads.stop]
                for slot, tensor in tensors.items()
            }
            store.write(Chunk.encode(replace(key, shard=f"{rank}of{degree}"), part))


def memory() -> MemoryTier:
    return MemoryTier(1 << 24)


class WatchedTier(WrapperTier):
    """Notes every read, and lets `before` look at it (and wait, or raise) first."""

    def __init__(
        self, tier, best_read: int = 1, before: Callable[[ChunkKey, list[Slot]], None] | None = None
    ):
        super().__init__(tier)
        self.best_read = best_read
        self.before = before
        self.reads: list[tuple[ChunkKey, list[str]]] = []
        self.quarantined: list[ChunkKey] = []
        self.asked: list[list[ChunkKey]] = []
        self._lock = threading.Lock()

    def leading(self, keys):
        self.asked.append(list(keys))
        return super().leading(keys)

    def read(self, key, slots=None, into=None):
        with self._lock:
            self.reads.append((key, [slot.name for slot in slots]))
        if self.before is not None:
            self.before(key, list(slots))
        return super().read(key, slots, into)

    def quarantine(self, key):
        self.quarantined.append(key)
        super().quarantine(key)
