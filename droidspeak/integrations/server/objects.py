"""LMCache's objects as our chunks, and back."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch

from droidspeak.errors import ChunkCorrupt
from droidspeak.integrations.server.wire import Description, Request, reply
from droidspeak.storage import Chunk, ChunkKey
from droidspeak.storage.codecs import as_bytes
from droidspeak.storage.objects import NAME_LABEL, object_chunk, object_key, object_slot

__all__ = ["answer_of", "chunk_of", "key_of"]

_SUCCESS = 200
_DESCRIPTION_LABEL = "lm"
_WHOLE = object_slot()


@lru_cache(maxsize=1 << 14)
def key_of(tenant: str, name: bytes) -> ChunkKey:
    """The chunk key of an LMCache key, compared by its exact bytes.

    LMCache's `model@world_size@worker_id@hash@dtype...` gives the owner and the shard; a name of another
    form is its own owner's.
    """
    model, *rest = name.split(b"@")
    world, worker = rest[:2] if len(rest) >= 4 else (b"", b"")
    sharded = all(part.isdigit() and len(part) <= 4 for part in (world, worker))
    shard = f"{worker.decode()}of{world.decode()}" if sharded else "0of1"
    return object_key(f"lm {tenant}", model.decode(errors="replace"), name, shard)


def chunk_of(tenant: str, request: Request, stored: torch.Tensor, codec: str) -> Chunk:
    """The chunk of a PUT. `stored` are its bytes, flat `uint8`; the `raw` codec keeps them, not a copy."""
    dtype, shape = request.description.tensor
    labels = {NAME_LABEL: request.key.decode(), _DESCRIPTION_LABEL: str(request.description)}
    key = key_of(tenant, request.key)
    if codec == "raw":
        return Chunk.of_stored(key, {_WHOLE: (stored, dtype, shape)}, tokens=0, labels=labels)
    return object_chunk(key, {0: stored.view(dtype).view(shape)}, labels=labels, codec=codec)


def answer_of(chunk: Chunk, name: bytes) -> tuple[bytes, memoryview]:
    """The reply to a GET: its header, and the object's bytes.

    Raises:
        ChunkCorrupt: it is not what was PUT under `name`: the client would take it for something else.
    """
    labels = chunk.header.labels
    stored = _decoded(chunk)
    header = _reply_of(labels.get(_DESCRIPTION_LABEL, ""), len(stored))
    if header is None or labels.get(NAME_LABEL, "").encode() != name:
        raise ChunkCorrupt(f"chunk {chunk.key} is not the object of its name")
    return header, stored


@lru_cache(maxsize=1 << 10)
def _reply_of(description: str, length: int) -> bytes | None:
    """The header of an object of `length` bytes; `None` if it cannot be what is said of it."""
    try:
        described = Description.parse(description)
        return None if described.fault(length) else reply(_SUCCESS, length, described)
    except (ValueError, struct.error):
        return None


def _decoded(chunk: Chunk) -> memoryview:
    # Tensors of another codec are decoded; raw ones are the stored bytes as they lie there.
    if chunk.header.records[_WHOLE].codec == "raw":
        return chunk.payload[_WHOLE].numpy().data
    return as_bytes(chunk.tensor(_WHOLE)).numpy().data
