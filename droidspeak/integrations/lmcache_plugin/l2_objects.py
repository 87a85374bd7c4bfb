"""The objects of LMCache's multiprocess server, as chunks of our store.

    ObjectKey   model, kv rank, object group, chunk hash, cache salt -> one `ChunkKey`
    MemoryObj   one tensor or several (one per layer group)          -> the chunk's `o` slots

`o.0` is an object of one part; the parts of an object of several are `o.1`, `o.2` ... So an object of
one part is never taken for a part of another. The cache salt enters the key's digest and nothing else.

Upstream: `lmcache/v1/distributed/api.py` (`ObjectKey`), `lmcache/v1/memory_management.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.memory_management import MemoryObj

from droidspeak.errors import UsageError
from droidspeak.storage import Chunk, ChunkHeader, ChunkKey, Slot
from droidspeak.storage.container import STORED_DTYPES
from droidspeak.storage.objects import NAME_LABEL, object_chunk, object_key, object_slot, object_slots

__all__ = ["Layout", "chunk_key", "chunk_of", "memory_of", "object_named_by"]

ORIGIN = "lmcache-l2"
_LAYOUT_LABEL = "layout"


def chunk_key(key: ObjectKey) -> ChunkKey:
    """The chunk that holds the object `key`. Every field counts, byte for byte."""
    model = key.model_name.encode()
    fields = (model, str(key.kv_rank).encode(), str(key.object_group_id).encode(), key.chunk_hash)
    name = b"".join(len(part).to_bytes(4, "little") + part for part in (*fields, key.cache_salt.encode()))
    world, rank = (key.kv_rank >> 24) & 0xFF, (key.kv_rank >> 16) & 0xFF
    return object_key(ORIGIN, key.model_name, name, f"{rank}of{world}")


def object_named_by(header: ChunkHeader) -> ObjectKey | None:
    """The object that a chunk holds, if it is one without a cache salt; salts are not written down."""
    fields = header.labels.get(NAME_LABEL, "").split("@")
    try:
        model, rank, group, digest = fields
        key = ObjectKey(bytes.fromhex(digest), model, int(rank, 16), int(group))
    except ValueError:
        return None
    return key if chunk_key(key) == header.key else None


@dataclass(frozen=True)
class Layout:
    """Dtypes and shapes of an object's parts, in their order in memory."""

    parts: tuple[tuple[torch.dtype, tuple[int, ...]], ...]

    @classmethod
    def of(cls, obj: MemoryObj) -> Layout:
        """The layout that LMCache gives `obj`; bytes if its memory was narrowed to fewer than that."""
        metadata = obj.metadata
        layouts = []
        if metadata.shapes and metadata.dtypes:
            layouts.append(cls._from(metadata.dtypes, metadata.shapes))
        if metadata.dtype is not None:
            layouts.append(cls._from([metadata.dtype], [metadata.shape]))
        size = obj.get_size()
        return next((layout for layout in layouts if layout.nbytes == size), cls(((torch.uint8, (size,)),)))

    @classmethod
    def _from(cls, dtypes: Sequence[torch.dtype], shapes: Sequence[torch.Size]) -> Layout:
        return cls(tuple((dtype, tuple(shape)) for dtype, shape in zip(dtypes, shapes, strict=True)))

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of each part."""
        return [dtype.itemsize * math.prod(shape) for dtype, shape in self.parts]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)

    @cached_property
    def slots(self) -> list[Slot]:
        """Where the parts are kept."""
        count = len(self.parts)
        return [object_slot()] if count == 1 else object_slots(range(1, count + 1))

    @cached_property
    def label(self) -> str:
        """The layout as the chunk's label says it."""
        return " ".join(
            f"{str(dtype).removeprefix('torch.')}[{','.join(map(str, shape))}]" for dtype, shape in self.parts
        )

    @property
    def told_by_slot(self) -> bool:
        """Whether the slot's own dtype and shape are all of the layout."""
        return len(self.parts) == 1 and self.parts[0][0] in STORED_DTYPES

    def fits(self, header: ChunkHeader) -> bool:
        """Whether the chunk holds an object of this layout."""
        return header.labels.get(_LAYOUT_LABEL) == self.label and set(header.records) == set(self.slots)

    def views(self, memory: torch.Tensor) -> dict[Slot, torch.Tensor]:
        """The parts in `memory`, as they are kept: views, no copies.

        Args:
            memory: flat `uint8` of `nbytes`.
        """
        cut = torch.split(memory, self.sizes)
        return {
            slot: part.view(dtype).view(shape) if dtype in STORED_DTYPES else part
            for slot, part, (dtype, shape) in zip(self.slots, cut, self.parts, strict=True)
        }


def memory_of(obj: MemoryObj) -> torch.Tensor:
    """The bytes of `obj` as flat `uint8`: a view that keeps LMCache's arena alive.

    Raises:
        UsageError: the object is not in the host's memory.
    """
    raw: torch.Tensor | None = obj.raw_tensor
    if raw is None or not raw.is_cpu:
        raise UsageError(f"{type(obj).__name__}: allowed are objects in host memory")
    return raw.reshape(-1).view(torch.uint8)[: obj.get_size()]


def chunk_of(key: ObjectKey, layout: Layout, tensors: Mapping[Slot, torch.Tensor], codec: str) -> Chunk:
    """The complete chunk of an object, over `tensors` as `Layout.views` gives them."""
    name = f"{key.model_name}@{key.kv_rank:#010x}@{key.object_group_id}@{key.chunk_hash.hex()}"
    labels = {NAME_LABEL: name, _LAYOUT_LABEL: layout.label}
    parts = {slot.layer: tensor for slot, tensor in tensors.items()}
    return object_chunk(chunk_key(key), parts, labels=labels, codec=codec)
