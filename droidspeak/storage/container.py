"""The chunk container: K, V and E of one chunk as one object that any safetensors reader opens.

Bytes of the object:

    u64 length N | JSON header, padded with blanks to N | E slots | K0 V0 K1 V1 ... of the layers

E comes first and layers are contiguous, so "E of layer s" and "layers a..b" are one range each.
Tensors are token-major: `k`, `v` are `[tokens, kv_heads, head_dim]`, `e` is `[tokens, hidden]`. An `o`
slot is an object of another system (`droidspeak.storage.objects`), of any shape. A coded slot is a
safetensors `U8` vector; its codec, dtype and shape stand in the metadata.

The header's `__metadata__` repeats the chunk key (a renamed or swapped object is caught), holds an
xxh3-64 of each slot's stored bytes, and opens with a digest of the rest of the header.

Format: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, lru_cache
from json.encoder import encode_basestring_ascii as _quoted
from operator import index
from typing import Any

import torch
import xxhash

from droidspeak.errors import ChunkCorrupt, ChunkIncomplete, UsageError
from droidspeak.storage.codecs import as_bytes, get_codec
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.tier import SlotBytes

__all__ = [
    "STORED_DTYPES",
    "Chunk",
    "ChunkHeader",
    "Slot",
    "SlotKind",
    "SlotRecord",
    "checksum",
    "coalesce",
    "place",
]

FORMAT = "droidspeak-chunk-1"
MAX_HEADER_BYTES = 16 * 1024 * 1024
_ALIGNMENT = 64
_OPENING = b'{"__metadata__":{"digest":"'
_DIGEST_WIDTH = 16
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
STORED_DTYPES = frozenset(_DTYPES.values())
"""Dtypes of tensors that the format knows."""


class SlotKind(StrEnum):
    """What a slot holds: keys (after RoPE), values, the layer's input, or another system's object."""

    K = "k"
    V = "v"
    E = "e"
    OBJECT = "o"

    # Enum's own hash is a Python call, and every slot is looked up many times.
    __hash__ = str.__hash__


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of a chunk: its kind and layer."""

    kind: SlotKind
    layer: int

    @property
    def name(self) -> str:
        return f"{self.kind.value}.{self.layer}"

    @property
    def order(self) -> tuple[bool, int, bool]:
        """Sorts slots as they lie in the object: E first, then K and V layer by layer."""
        return (self.kind is not SlotKind.E, self.layer, self.kind is SlotKind.V)

    @classmethod
    def parse(cls, name: str) -> Slot:
        kind, _, layer = name.partition(".")
        return cls(SlotKind(kind), int(layer))

    @classmethod
    def kv(cls, layers: Iterable[int]) -> list[Slot]:
        """K and V of `layers`, in the object's order."""
        return [cls(kind, layer) for layer in sorted(layers) for kind in (SlotKind.K, SlotKind.V)]


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """One row of a header.

    Attributes:
        slot: which tensor.
        dtype, shape: of the decoded tensor.
        codec: name of the codec of the stored bytes.
        start, end: stored bytes, counted from the end of the header.
        checksum: xxh3-64 of the stored bytes.
    """

    slot: Slot
    dtype: torch.dtype
    shape: tuple[int, ...]
    codec: str
    start: int
    end: int
    checksum: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class ChunkHeader:
    """What a chunk holds and where. `nbytes` and `data_start` are in bytes of the whole object."""

    key: ChunkKey
    tokens: int
    records: Mapping[Slot, SlotRecord]
    labels: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def encoded(self) -> bytes:
        """The object's first bytes: length, JSON, padding."""
        records = self.records.items()
        checksums = ",".join(f'"{slot.name}":"{record.checksum:016x}"' for slot, record in records)
        coded = {
            slot.name: [record.codec, _DTYPE_NAMES[record.dtype], list(record.shape)]
            for slot, record in records
            if record.codec != "raw"
        }
        labels = ",".join(f"{_quoted(name)}:{_quoted(self.labels[name])}" for name in sorted(self.labels))
        table = ",".join(map(_table_row, self.records.values()))
        # As a JSON encoder would write it, compact; but one is ten times as slow, and every write pays.
        rest = (
            f'","format":"{FORMAT}","key":"{self.key}","tokens":"{self.tokens}",'
            f'"checksums":{_quoted("{" + checksums + "}")},"coded":{_quoted(_compact(coded))},'
            f'"labels":{_quoted("{" + labels + "}")}}}{"," if table else ""}{table}}}'
        ).encode()
        size = len(_OPENING) + _DIGEST_WIDTH + len(rest)
        padding = -(size + 8) % _ALIGNMENT
        rest += b" " * padding
        return struct.pack("<Q", size + padding) + _OPENING + _header_digest(rest) + rest

    @property
    def digest(self) -> str:
        """The header's own digest, 16 hex digits. It covers the checksums, so it names the content."""
        start = 8 + len(_OPENING)
        return self.encoded[start : start + _DIGEST_WIDTH].decode()

    @property
    def data_start(self) -> int:
        return len(self.encoded)

    @cached_property
    def nbytes(self) -> int:
        return self.data_start + max((record.end for record in self.records.values()), default=0)

    @cached_property
    def e_layers(self) -> tuple[int, ...]:
        return tuple(slot.layer for slot in self.records if slot.kind is SlotKind.E)

    @cached_property
    def kv_layers(self) -> tuple[int, ...]:
        return tuple(slot.layer for slot in self.records if slot.kind is SlotKind.K)

    @cached_property
    def slot_bytes(self) -> SlotBytes:
        """Stored bytes by kind."""
        sums = dict.fromkeys(SlotKind, 0)
        for slot, record in self.records.items():
            sums[slot.kind] += record.end - record.start
        return SlotBytes(sums[SlotKind.K], sums[SlotKind.V], sums[SlotKind.E])

    @property
    def codec(self) -> str:
        return next(iter(self.records.values())).codec if self.records else "raw"

    def select(self, slots: Iterable[Slot] | None) -> list[SlotRecord]:
        """Records of `slots` (all when `None`) in the object's order. Raises `ChunkIncomplete`."""
        if slots is None:
            return list(self.records.values())
        wanted = sorted(set(slots), key=lambda slot: slot.order)
        missing = [slot.name for slot in wanted if slot not in self.records]
        if missing:
            raise ChunkIncomplete(f"chunk {self.key} lacks {', '.join(missing)}")
        return [self.records[slot] for slot in wanted]

    def expect(self, key: ChunkKey, nbytes: int | None = None) -> ChunkHeader:
        """Itself, if it is the header of `key` in an object of `nbytes`. Raises `ChunkCorrupt`."""
        if self.key != key:
            raise ChunkCorrupt(f"object of {key} holds chunk {self.key}", "wrong_key")
        if nbytes is not None and nbytes != self.nbytes:
            kind = "truncated" if nbytes < self.nbytes else "corrupt"
            raise ChunkCorrupt(f"chunk {key}: {nbytes} bytes instead of {self.nbytes}", kind)
        return self

    def check(self, record: SlotRecord, stored: memoryview) -> None:
        """Raises `ChunkCorrupt` if `stored` are not the bytes of `record`."""
        if xxhash.xxh3_64_intdigest(stored) != record.checksum:
            raise ChunkCorrupt(f"chunk {self.key}: {record.slot.name} differs from its checksum")

    @staticmethod
    def length(first_bytes: bytes) -> int:
        """Bytes of the whole header, from the object's first 8. Raises `ChunkCorrupt`."""
        if len(first_bytes) < 8:
            raise ChunkCorrupt(f"object of {len(first_bytes)} bytes is no chunk", "truncated")
        size = int(struct.unpack_from("<Q", first_bytes)[0])
        if not len(_OPENING) + _DIGEST_WIDTH < size <= MAX_HEADER_BYTES:
            raise ChunkCorrupt(f"header length {size} is not believable")
        return 8 + size

    @classmethod
    def parse(cls, data: bytes) -> ChunkHeader:
        """The header in `data` (exactly its bytes). Raises `ChunkCorrupt` for anything else."""
        body = data[8:]
        if len(data) != cls.length(data) or not body.startswith(_OPENING):
            kind = "truncated" if len(data) < cls.length(data) else "corrupt"
            raise ChunkCorrupt("header is cut short or not of this format", kind)
        rest = body[len(_OPENING) + _DIGEST_WIDTH :]
        if _header_digest(rest) != body[len(_OPENING) : len(_OPENING) + _DIGEST_WIDTH]:
            raise ChunkCorrupt("header differs from its digest")
        try:
            return cls._from_table(json.loads(body), data)
        except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ChunkCorrupt(f"header cannot be read: {error}") from None

    @classmethod
    def _from_table(cls, table: dict[str, Any], data: bytes) -> ChunkHeader:
        metadata = table.pop("__metadata__")
        if metadata["format"] != FORMAT:
            raise ChunkCorrupt(f"format {metadata['format']!r}; readable: {FORMAT}")
        checksums, coded = json.loads(metadata["checksums"]), json.loads(metadata["coded"])
        records = {}
        for name, row in table.items():
            record = _record(name, row, int(checksums[name], 16), coded.get(name))
            records[record.slot] = record
        key, tokens = ChunkKey.parse(metadata["key"]), int(metadata["tokens"])
        _check_layout(records.values(), tokens)
        labels = json.loads(metadata["labels"])
        if not all(isinstance(value, str) for value in labels.values()):
            raise ValueError("labels that are not text")
        header = cls(key, tokens, records, labels)
        header.__dict__["encoded"] = data
        return header


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) if value else "{}"


def _header_digest(rest: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(rest).encode()


def _table_row(record: SlotRecord) -> str:
    raw = record.codec == "raw"
    dtype, shape = (_DTYPE_NAMES[record.dtype], record.shape) if raw else ("U8", (record.nbytes,))
    sizes = ",".join(map(str, shape))
    offsets = f"{record.start},{record.end}"
    return f'"{record.slot.name}":{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[{offsets}]}}'


# Chunks of one model have the same names, and every header that is read has some dozens of them.
_slot = lru_cache(maxsize=4096)(Slot.parse)


def _record(name: str, row: dict[str, Any], checksum: int, coded: list[Any] | None) -> SlotRecord:
    codec, dtype, shape = coded if coded else ("raw", row["dtype"], row["shape"])
    get_codec(codec)  # who does not know the codec cannot read the chunk
    shape, (start, end) = tuple(map(index, shape)), map(index, row["data_offsets"])
    return SlotRecord(_slot(name), _DTYPES[dtype], shape, codec, start, end, checksum)


def _check_layout(records: Iterable[SlotRecord], tokens: int) -> None:
    position = 0
    for record in records:
        raw_bytes = math.prod(record.shape) * record.dtype.itemsize
        if record.start != position or record.end < position or min(record.shape, default=0) < 0:
            raise ValueError(f"{record.slot.name} lies at {record.start}..{record.end}, not from {position}")
        if record.slot.kind is not SlotKind.OBJECT and record.shape[:1] != (tokens,):
            raise ValueError(f"{record.slot.name} is {record.shape}, the chunk has {tokens} tokens")
        if record.codec == "raw" and record.nbytes != raw_bytes:
            raise ValueError(f"{record.slot.name} has {record.nbytes} bytes, its shape needs {raw_bytes}")
        position = record.end


def coalesce(records: Iterable[SlotRecord], limit: int) -> Iterator[list[SlotRecord]]:
    """Groups neighbouring records into ranges of at most `limit` bytes (or one record)."""
    group: list[SlotRecord] = []
    for record in records:
        if group and (record.start != group[-1].end or record.end - group[0].start > limit):
            yield group
            group = []
        group.append(record)
    if group:
        yield group


@dataclass(frozen=True)
class Chunk:
    """A chunk, or some of its slots, in memory.

    Attributes:
        header: of the whole chunk.
        payload: stored (coded) bytes by slot, flat `uint8` tensors. Treated as immutable.
    """

    header: ChunkHeader
    payload: Mapping[Slot, torch.Tensor]

    @classmethod
    def encode(
        cls,
        key: ChunkKey,
        tensors: Mapping[Slot, torch.Tensor],
        *,
        codec: str = "raw",
        labels: Mapping[str, str] | None = None,
    ) -> Chunk:
        """A complete chunk from token-major CPU tensors; `raw` keeps views of them, not copies.

        Raises:
            UsageError: no tensors, tensors that disagree about the number of tokens, or a dtype that
                the format does not know.
        """
        unknown = {str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in _DTYPE_NAMES}
        if unknown:
            raise UsageError(f"chunk {key}: {', '.join(sorted(unknown))}; allowed: {', '.join(_DTYPES)}")
        tokens = {tensor.shape[0] for slot, tensor in tensors.items() if slot.kind is not SlotKind.OBJECT}
        if len(tokens) > 1 or not tensors:
            raise UsageError(f"chunk {key}: tensors of {sorted(tokens)} tokens; one number is allowed")
        coder = get_codec(codec)
        parts = {
            slot: (coder.encode(tensors[slot].contiguous()), tensors[slot].dtype, tuple(tensors[slot].shape))
            for slot in sorted(tensors, key=lambda slot: slot.order)
        }
        return cls.of_stored(key, parts, tokens=tokens.pop() if tokens else 0, codec=codec, labels=labels)

    @classmethod
    def of_stored(
        cls,
        key: ChunkKey,
        parts: Mapping[Slot, tuple[torch.Tensor, torch.dtype, tuple[int, ...]]],
        *,
        tokens: int,
        codec: str = "raw",
        labels: Mapping[str, str] | None = None,
    ) -> Chunk:
        """A complete chunk of slots that are coded already.

        Args:
            parts: in the object's order, stored bytes (flat `uint8`, kept as they are), dtype and shape.
        """
        records, payload, position = {}, {}, 0
        for slot, (stored, dtype, shape) in parts.items():
            end = position + stored.numel()
            records[slot] = SlotRecord(slot, dtype, shape, codec, position, end, checksum(stored))
            payload[slot], position = stored, end
        return cls(ChunkHeader(key, tokens, records, labels or {}), payload)

    @property
    def key(self) -> ChunkKey:
        return self.header.key

    @property
    def complete(self) -> bool:
        return len(self.payload) == len(self.header.records)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored slots that are here."""
        return sum(stored.numel() for stored in self.payload.values())

    def tensor(self, slot: Slot, out: torch.Tensor | None = None) -> torch.Tensor:
        """The decoded tensor of `slot`: a view if raw, aligned and `out` is not given, else in `out`.

        Raises:
            ChunkIncomplete: the slot is not here.
            ChunkCorrupt: `out` or the stored bytes do not fit the header.
        """
        if slot not in self.payload:
            raise ChunkIncomplete(f"chunk {self.key} is here without {slot.name}")
        record, stored = self.header.records[slot], self.payload[slot]
        if out is None:
            if record.codec == "raw":
                aligned = stored.storage_offset() % record.dtype.itemsize == 0
                return (stored if aligned else stored.clone()).view(record.dtype).view(record.shape)
            out = torch.empty(record.shape, dtype=record.dtype)
        if out.dtype != record.dtype or tuple(out.shape) != record.shape:
            raise ChunkCorrupt(
                f"{slot.name} is {record.dtype} {record.shape}, not {out.dtype} {tuple(out.shape)}"
            )
        get_codec(record.codec).decode(stored, out)
        return out

    def buffers(self) -> list[memoryview]:
        """The whole object as a list of buffers, for one gathered write. Raises `ChunkIncomplete`."""
        absent = [slot.name for slot in self.header.records if slot not in self.payload]
        if absent:
            raise ChunkIncomplete(f"chunk {self.key} is here without {', '.join(absent)}")
        stored = (self.payload[slot] for slot in self.header.records)
        return [memoryview(self.header.encoded), *map(_view, stored)]

    def to_bytes(self) -> bytes:
        """The whole object. Raises `ChunkIncomplete`."""
        return b"".join(self.buffers())

    @classmethod
    def from_bytes(cls, data: bytes, key: ChunkKey) -> Chunk:
        """The chunk `key` in `data`, every slot checked. Raises `ChunkCorrupt`."""
        ChunkHeader.length(data[:8])
        return cls.adopt(torch.frombuffer(bytearray(data), dtype=torch.uint8), key)

    @classmethod
    def adopt(cls, stored: torch.Tensor, key: ChunkKey) -> Chunk:
        """As `from_bytes`, of a flat `uint8` CPU tensor; the slots are views of it, not copies."""
        data = _view(stored)
        length = ChunkHeader.length(bytes(data[:8]))
        header = ChunkHeader.parse(bytes(data[:length])).expect(key, len(data))
        arena = stored[header.data_start :]
        payload = {slot: arena[record.start : record.end] for slot, record in header.records.items()}
        return cls(header, payload).verify()

    def verify(self, slots: Iterable[Slot] | None = None) -> Chunk:
        """Itself, if the stored bytes match their checksums. Raises `ChunkCorrupt`."""
        for slot in self.payload if slots is None else slots:
            self.header.check(self.header.records[slot], _view(self.payload[slot]))
        return self


def place(
    records: Iterable[SlotRecord], into: Mapping[Slot, torch.Tensor] | None = None
) -> dict[Slot, torch.Tensor]:
    """Memory to read `records` into: the tensors of `into` where the bytes can land there as they
    are (raw, same size, contiguous, on the CPU), slices of one fresh arena for the rest."""
    placed: dict[Slot, torch.Tensor] = {}
    rest: list[SlotRecord] = []
    for record in records:
        tensor = into.get(record.slot) if into else None
        if tensor is not None and _can_land(record, tensor):
            placed[record.slot] = as_bytes(tensor)
        else:
            rest.append(record)
    sizes = [record.nbytes for record in rest]
    arena = torch.empty(sum(sizes), dtype=torch.uint8)
    placed.update(zip((record.slot for record in rest), torch.split(arena, sizes), strict=True))
    return placed


def _can_land(record: SlotRecord, tensor: torch.Tensor) -> bool:
    same = tensor.dtype == record.dtype and tensor.shape == record.shape
    return same and record.codec == "raw" and tensor.is_cpu and tensor.is_contiguous()


def checksum(stored: torch.Tensor) -> int:
    """xxh3-64 of a flat `uint8` CPU tensor."""
    return xxhash.xxh3_64_intdigest(_view(stored))


def _view(stored: torch.Tensor) -> memoryview:
    return stored.numpy().data
