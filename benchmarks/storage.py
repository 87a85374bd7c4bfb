"""Tiers against the plain system calls under them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import Series, interleaved, table
from droidspeak.storage import Chunk, ChunkKey, PrefixHasher, Slot, SlotKind, SourceId
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.keys import TokenIds
from droidspeak.storage.memory import MemoryTier

_SOURCE = SourceId("a" * 64)
_LAYERS, _TOKENS, _HEADS, _HEAD_DIM, _HIDDEN = 32, 256, 8, 128, 4096
_CHUNKS = 8


def _tensors(seed: int) -> dict[Slot, torch.Tensor]:
    """K, V of an 8B model's chunk in bfloat16, and E of one layer."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    slots = {slot: random(_TOKENS, _HEADS, _HEAD_DIM) for slot in Slot.kv(range(_LAYERS))}
    return {Slot(SlotKind.E, 11): random(_TOKENS, _HIDDEN), **slots}


def _keys(count: int) -> list[ChunkKey]:
    prefixes = PrefixHasher(16).hashes(list(range(16 * count)))
    return [ChunkKey(_SOURCE, "0of1", prefix) for prefix in prefixes]


def _file_of(root: Path, key: ChunkKey) -> Path:
    (path,) = root.rglob(f"{key.prefix}.safetensors")
    return path


def disk_read(root: Path, tier: DiskTier, keys: list[ChunkKey]) -> list[list[str]]:
    """Whole chunks into preallocated memory: plain pread (peer), and ours with checksums."""
    paths = [_file_of(root, key) for key in keys]
    nbytes = sum(path.stat().st_size for path in paths)
    buffer = torch.zeros(max(path.stat().st_size for path in paths), dtype=torch.uint8).numpy().data
    into = {slot: torch.zeros_like(tensor) for slot, tensor in _tensors(0).items()}

    def plain() -> None:
        for path in paths:
            file = os.open(path, os.O_RDONLY)
            os.preadv(file, [buffer], 0)
            os.close(file)

    def ours() -> None:
        for key in keys:
            assert tier.read(key, None, into) is not None

    series = interleaved({"plain": plain, "ours": ours}, rounds=9)
    return [_row("read a chunk of 34 MB, warm", series, nbytes, "plain pread", 0.9)]


def disk_read_layer(root: Path, tier: DiskTier, keys: list[ChunkKey]) -> list[list[str]]:
    """One layer of 32, cold header and warm: time, and bytes read by bytes needed."""
    slots = Slot.kv([17])
    shape = (_TOKENS, _HEADS, _HEAD_DIM)
    into = {slot: torch.zeros(shape, dtype=torch.bfloat16) for slot in slots}
    needed = sum(tensor.nbytes for tensor in into.values())
    paths = [_file_of(root, key) for key in keys]
    buffer = torch.zeros(needed, dtype=torch.uint8).numpy().data
    headers = sum(chunk.header.data_start for key in keys if (chunk := tier.read(key, slots)))

    def plain() -> None:
        for path in paths:
            file = os.open(path, os.O_RDONLY)
            os.preadv(file, [buffer], 8 << 20)
            os.close(file)

    def ours() -> None:
        for key in keys:
            assert tier.read(key, slots, into) is not None

    series = interleaved({"plain": plain, "ours": ours}, rounds=15)
    row = _row("read one layer of 32, warm", series, needed * len(keys), "plain pread", None)
    read_share = (needed * len(keys) + headers) / (needed * len(keys))
    return [row, ["bytes read for one layer, header not cached", "1.000", f"{read_share:.3f}", "", "<= 1.2"]]


def disk_write(root: Path) -> list[list[str]]:
    """Write and rename (peer) against encode, checksum, write, rename and catalog."""
    tensors = [_tensors(seed) for seed in range(_CHUNKS)]
    keys = _keys(_CHUNKS)
    whole = [Chunk.encode(key, content).to_bytes() for key, content in zip(keys, tensors, strict=True)]
    (root / "plain").mkdir()

    def plain() -> None:
        for key, data in zip(keys, whole, strict=True):
            temporary = root / "plain" / "new"
            temporary.write_bytes(data)
            temporary.replace(root / "plain" / key.prefix)

    with DiskTier(root / "ours", min_free=0) as tier:

        def ours() -> None:
            for key, content in zip(keys, tensors, strict=True):
                tier.write(Chunk.encode(key, content))

        series = interleaved({"plain": plain, "ours": ours}, rounds=9)
    return [_row("write a chunk of 34 MB", series, sum(map(len, whole)), "plain write + rename", 0.8)]


def cpu_lookup() -> list[list[str]]:
    """A prefix of 1,000 chunks: hash its 256,000 token ids and find the chunks in the CPU tier."""
    size, count = 256, 1000
    token_ids = [(7 * n) % 32_000 for n in range(size * count)]
    tiny = {slot: torch.zeros(size, 1, 2) for slot in Slot.kv([0])}
    hasher = PrefixHasher(size)
    with MemoryTier(capacity=1 << 30) as tier:
        for prefix in hasher.hashes(token_ids):
            tier.write(Chunk.encode(ChunkKey(_SOURCE, "0of1", prefix), tiny))

        def lookup(ids: TokenIds) -> None:
            keys = [ChunkKey(_SOURCE, "0of1", prefix) for prefix in hasher.hashes(ids)]
            assert len(tier.leading(keys)) == count

        tensor = torch.tensor(token_ids)
        series = interleaved({"list": lambda: lookup(token_ids), "tensor": lambda: lookup(tensor)}, rounds=15)
    return [
        [f"lookup of 1,000 chunks, ids in a {kind}, CPU tier, ms", "", times.spread(), "", "< 10"]
        for kind, times in series.items()
    ]


def _row(what: str, series: dict[str, Series], nbytes: int, peer: str, target: float | None) -> list[str]:
    plain, ours = series["plain"], series["ours"]
    return [
        f"{what}, GB/s",
        f"{plain.rate(nbytes)} ({peer})",
        ours.rate(nbytes),
        f"{ours.ratio(plain):.2f}",
        f">= {target}" if target else "",
    ]


def run() -> str:
    """The section of the report."""
    keys = _keys(_CHUNKS)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with DiskTier(root / "store", min_free=0) as tier:
            for seed, key in enumerate(keys):
                tier.write(Chunk.encode(key, _tensors(seed)))
            rows = [
                *disk_read(root / "store", tier, keys),
                *disk_read_layer(root / "store", tier, keys),
            ]
        rows += disk_write(root)
    rows += cpu_lookup()
    return "## Tiers\n\n" + table(["", "peer", "ours", "ours / peer", "target"], rows)
