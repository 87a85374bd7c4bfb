"""LMCache's keys and memory objects as our chunks, and back.

    CacheEngineKey         one chunk; its slots are the tensors (groups) of the memory object
    LayerCacheEngineKey    all layers of an LMCache chunk are one chunk; slot i is layer i

An LMCache key says of the model only what the engine was started with, a path or a name: no revision of
the weights and no adapter. What else must keep two models apart enters the owner of the chunk key.
"""

from __future__ import annotations

import ctypes
import json
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from droidspeak.storage import ChunkKey, Slot
from droidspeak.storage.container import STORED_DTYPES, SlotRecord
from droidspeak.storage.objects import object_key, object_slots

__all__ = ["LAYOUT_LABEL", "Expected", "Layout", "Naming", "layer_of", "lend", "tensors"]

LAYOUT_LABEL = "lmcache"
_ORIGIN = "lmcache"
Part = tuple[torch.dtype, tuple[int, ...]]


def layer_of(key: Any) -> int | None:
    """The layer of a `LayerCacheEngineKey`, `None` for a key of all layers."""
    layer = getattr(key, "layer_id", None)
    return None if layer is None else int(layer)


@dataclass(frozen=True)
class Naming:
    """Chunk keys of one engine.

    Attributes:
        shape: the engine's `kv_shape` without its tokens: engines that cut KV otherwise never meet.
        identity, salt: as of `PluginOptions`.
    """

    shape: tuple[int, ...] = ()
    identity: str = ""
    salt: str = ""

    def chunk_key(self, key: Any) -> ChunkKey:
        """The chunk of an LMCache key; all layers of a chunk have the same."""
        owner = (key.model_name, str(key.dtype), self.shape, self.identity, self.salt)
        # LMCache joins the parts of a key with `@` and `%`, which may also stand in them.
        tags = tuple((str(name), str(value)) for name, value in key.tags or ())
        form = "whole" if layer_of(key) is None else "layers"
        name = (form, type(key.chunk_hash).__name__, key.chunk_hash_hex, tags)
        return _chunk_key(owner, name, f"{key.worker_id}of{key.world_size}")


@lru_cache(maxsize=1 << 14)
def _chunk_key(owner: tuple[Any, ...], name: tuple[Any, ...], shard: str) -> ChunkKey:
    return object_key(_ORIGIN, json.dumps(owner), json.dumps(name).encode(), shard)


@dataclass(frozen=True)
class Layout:
    """What is needed to make the memory objects of a chunk again.

    Attributes:
        fmt: name of LMCache's `MemoryFormat`.
        parts: dtype and shape by slot.
    """

    fmt: str
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, memory_obj: Any) -> Layout | None:
        """The layout of a memory object of tensors; `None` for one that has none (coded bytes)."""
        dtypes, shapes = memory_obj.get_dtypes(), memory_obj.get_shapes()
        if not dtypes or not all(isinstance(dtype, torch.dtype) for dtype in dtypes):
            return None
        parts = tuple((dtype, tuple(shape)) for dtype, shape in zip(dtypes, shapes, strict=True))
        layout = cls(memory_obj.get_memory_format().name, parts)
        whole = all(_nbytes(part) for part in parts) and layout.nbytes == memory_obj.get_size()
        return layout if whole else None

    @classmethod
    def stacked(cls, layouts: Sequence[Layout]) -> Layout | None:
        """The layout of a chunk of layers, one part each; `None` if they do not go together."""
        fmts = {layout.fmt for layout in layouts}
        if len(fmts) != 1 or any(len(layout.parts) != 1 for layout in layouts):
            return None
        return cls(fmts.pop(), tuple(layout.parts[0] for layout in layouts))

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(part) for part in self.parts)

    def describes(self, records: Mapping[Slot, SlotRecord]) -> bool:
        """Whether `records` are those of a chunk of this layout."""
        stored = [_stored(part) for part in self.parts]
        return [(record.dtype, record.shape) for record in records.values()] == stored and set(
            records
        ) == set(object_slots(range(len(stored))))

    def only(self, slots: Sequence[int]) -> list[Layout]:
        """A layout for each of `slots` alone."""
        return [Layout(self.fmt, (self.parts[slot],)) for slot in slots]

    def __str__(self) -> str:
        return json.dumps([self.fmt, [[_name_of(dtype), list(shape)] for dtype, shape in self.parts]])

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout that `str` wrote. Raises `ValueError` for anything else."""
        try:
            fmt, parts = json.loads(text)
            made = tuple((_dtype(name), tuple(int(size) for size in shape)) for name, shape in parts)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a layout: {error}") from None
        return cls(str(fmt), made)


@dataclass(frozen=True)
class Expected:
    """The layouts that an engine can use. Formats that are not KV are not checked.

    Attributes:
        metadata: LMCache's, asked at each use: vLLM adds its layer groups after us.
        layer_fmt: name of the format of one layer.
    """

    metadata: Any
    layer_fmt: str = "KV_T2D"

    @property
    def layers(self) -> int:
        return int(self.metadata.kv_shape[0])

    def full(self, *, layered: bool) -> Layout:
        """The layout of a chunk of all its tokens."""
        return self._of(self.metadata.chunk_size, layered=layered)

    def fault(self, layout: Layout, *, layered: bool) -> str | None:
        """Why `layout` is of no use here, `None` if it is."""
        if layout.fmt not in _TOKENS_AT or not layout.parts:
            return None
        place = _TOKENS_AT[layout.fmt]
        shape = layout.parts[0][1]
        tokens = shape[place] if place < len(shape) else 0
        longest = max(self.metadata.chunk_size, self.metadata.kv_shape[2])
        wanted = self._of(tokens, layered=layered)
        return None if 0 < tokens <= longest and layout == wanted else f"{layout}, not {wanted}"

    def _of(self, tokens: int, *, layered: bool) -> Layout:
        if not layered:
            fmt = "KV_MLA_FMT" if self.metadata.use_mla else "KV_2LTD"
            shapes = [tuple(shape) for shape in self.metadata.get_shapes(tokens)]
            return Layout(fmt, tuple(zip(self.metadata.get_dtypes(), shapes, strict=True)))
        layers, _, _, heads, width = self.metadata.kv_shape
        if self.metadata.use_mla:
            shape: tuple[int, ...] = (tokens, heads * width)
        elif self.layer_fmt == "KV_2TD":
            shape = (2, tokens, heads * width)
        else:
            shape = (tokens, 2, heads * width)
        return Layout(self.layer_fmt, ((self.metadata.kv_dtype, shape),) * layers)


_TOKENS_AT = {"KV_2LTD": 2, "KV_MLA_FMT": 2, "KV_T2D": 0, "KV_2TD": 1}


def lend(memory_obj: Any) -> memoryview:
    """The bytes of a memory object, with a reference that is given back when the last user is gone.

    A read that has overstayed its deadline may still write into the memory that it was given. So the
    reference hangs on the memory itself: tensors over the view keep it too.
    """
    view = memoryview(memory_obj.byte_array).cast("B")
    if isinstance(view.obj, ctypes.Array):
        memory_obj.ref_count_up()
        weakref.finalize(view.obj, memory_obj.ref_count_down).atexit = False
    return view


def tensors(view: memoryview, layout: Layout) -> list[torch.Tensor]:
    """A tensor over `view` for each part of `layout`, in the dtype and shape in which it is stored."""
    made, offset = [], 0
    for part in layout.parts:
        dtype, shape = _stored(part)
        flat = torch.frombuffer(view, dtype=dtype, count=math.prod(shape), offset=offset)
        made.append(flat.view(shape))
        offset += _nbytes(part)
    return made


def _stored(part: Part) -> Part:
    return part if part[0] in STORED_DTYPES else (torch.uint8, (_nbytes(part),))


def _nbytes(part: Part) -> int:
    return math.prod(part[1]) * part[0].itemsize


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"not a dtype: {name!r}")
    return dtype
