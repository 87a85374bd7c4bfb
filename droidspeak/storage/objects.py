"""Objects of other systems, kept as chunks.

What another cache hands over (an LMCache memory object, say) is bytes with a name, a dtype and a shape.
Kept in our container it has all that chunks have: checksums, tiers, eviction, pins, range reads. It
takes `o` slots, one for each part that can be read alone, and zero tokens: its name is opaque, so it is
found by whoever stored it and never taken for the KV of a prefix.

    source    digest of where the name comes from (a protocol and its namespace) and whose object it is
    prefix    digest of the name's exact bytes: two spellings are two objects
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch

from droidspeak.storage.container import Chunk, Slot, SlotKind
from droidspeak.storage.keys import ChunkKey, SourceId

__all__ = ["NAME_LABEL", "object_chunk", "object_key", "object_slot", "object_slots"]

NAME_LABEL = "name"
_SOURCE, _NAME = b"droidspeak object source 1", b"droidspeak object name 1"


def object_key(origin: str, owner: str, name: bytes, shard: str = "0of1") -> ChunkKey:
    """The key of the object called `name`.

    Args:
        origin: the protocol and its namespace, such as `"lm"`; different origins never meet.
        owner: whose object it is, usually the model as the other system calls it; usage is kept by owner.
        name: exact bytes.
        shard: `"<rank>of<size>"`.
    """
    source = _digest(_SOURCE, origin.encode(), owner.encode())
    return ChunkKey(SourceId(source), shard, _digest(_NAME, name))


def object_slot(part: int = 0) -> Slot:
    """The slot of one part of an object: of one layer, or of all of it (0)."""
    return Slot(SlotKind.OBJECT, part)


def object_slots(parts: Iterable[int]) -> list[Slot]:
    """The slots of `parts`."""
    return [object_slot(part) for part in parts]


def object_chunk(
    key: ChunkKey, parts: Mapping[int, torch.Tensor], *, labels: Mapping[str, str], codec: str = "raw"
) -> Chunk:
    """A complete chunk of an object's parts; `raw` keeps views of the tensors, not copies.

    Args:
        parts: contiguous CPU tensors of any shape, in a dtype that the container knows.
        labels: text to keep with it; `NAME_LABEL` is the name for people.

    Raises:
        UsageError: as `Chunk.encode`.
    """
    tensors = {object_slot(part): tensor for part, tensor in parts.items()}
    return Chunk.encode(key, tensors, codec=codec, labels=labels)


def _digest(kind: bytes, *parts: bytes) -> str:
    state = hashlib.sha256(kind)
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()
