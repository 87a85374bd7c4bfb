"""Small chunks of random bits, and the one comparison that counts."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch

from droidspeak.storage.container import Chunk, Slot, SlotKind
from droidspeak.storage.keys import ChunkKey, SourceId, salt_tag

__all__ = ["DTYPES", "assert_holds", "make_chunk", "make_key"]

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_KV_HEADS, _HEAD_DIM, _HIDDEN = 2, 4, 8


def make_key(seed: int, source: int = 0, shard: str = "0of1") -> ChunkKey:
    """A key that is the same for the same arguments."""
    digest = hashlib.sha256(f"prefix {seed}".encode()).hexdigest()
    return ChunkKey(SourceId(hashlib.sha256(f"source {source}".encode()).hexdigest()), shard, digest)


def make_chunk(
    seed: int,
    *,
    key: ChunkKey | None = None,
    layers: int = 2,
    e_layers: Collection[int] = (1,),
    tokens: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    codec: str = "raw",
    salt: str = "",
) -> Chunk:
    """A small chunk of random bits (NaNs and infinities among them), the same for the same arguments.

    Args:
        seed: of the content, and of the key if none is given.
        layers: layers with K and V, from 0.
        e_layers: layers whose E is stored too.
        salt: its tag is kept with the chunk, as a connector does; it does not enter the key.
    """
    source = torch.Generator().manual_seed(seed)

    def bits(*shape: int) -> torch.Tensor:
        width = shape[-1] * dtype.itemsize
        return torch.randint(0, 256, (*shape[:-1], width), dtype=torch.uint8, generator=source).view(dtype)

    tensors = {slot: bits(tokens, _KV_HEADS, _HEAD_DIM) for slot in Slot.kv(range(layers))}
    tensors |= {Slot(SlotKind.E, layer): bits(tokens, _HIDDEN) for layer in e_layers}
    labels = {"salt": salt_tag(salt)} if salt else {}
    return Chunk.encode(key or make_key(seed), tensors, codec=codec, labels=labels)


def assert_holds(got: Chunk | None, expected: Chunk, slots: Collection[Slot] | None = None) -> None:
    """`got` has the header of `expected` and exactly `slots` (all when `None`), bit for bit."""
    assert got is not None
    assert got.header == expected.header
    assert set(got.payload) == (set(expected.payload) if slots is None else set(slots))
    for slot, stored in got.payload.items():
        assert torch.equal(stored.cpu(), expected.payload[slot]), slot.name
