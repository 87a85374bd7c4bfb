"""Makes a golden store. Run once per released format, never to change one that is there.

    python tests/storage/golden.py tests/data/store-2

Values come from arithmetic, not from a random generator, so that they are the same in every version of
every library. `test_golden.py` reads them back from all golden stores.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from droidspeak.storage.container import Chunk, Slot, SlotKind
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.keys import ChunkKey, PrefixHasher, SourceId

SENDER, TUNED = SourceId("5e" * 32), SourceId("7d" * 32)
TOKENS, KV_HEADS, HEAD_DIM, HIDDEN = 16, 2, 8, 32
LAYERS = 3


def golden_chunks() -> Iterator[Chunk]:
    """Every codec, dtype and kind of slot that is in a golden store."""
    prefixes = PrefixHasher(TOKENS, salt="golden").hashes(range(5 * TOKENS))
    whole, second, of_shard = "0of1", "1of2", LAYERS - 1
    yield _chunk(ChunkKey(SENDER, whole, prefixes[0]), torch.bfloat16, "raw", e_layers=(1,))
    yield _chunk(ChunkKey(SENDER, whole, prefixes[1]), torch.bfloat16, "zstd", e_layers=(0, 2))
    yield _chunk(ChunkKey(SENDER, whole, prefixes[2]), torch.float16, "raw", e_layers=())
    yield _chunk(ChunkKey(TUNED, whole, prefixes[0]), torch.float32, "zstd", e_layers=(of_shard,))
    yield _chunk(ChunkKey(TUNED, second, prefixes[0]), torch.float32, "raw", e_layers=())
    yield _chunk(ChunkKey(TUNED, second, prefixes[3]), torch.float8_e4m3fn, "raw", e_layers=(0,))
    yield _chunk(ChunkKey(TUNED, second, prefixes[4]), torch.float8_e5m2, "zstd", e_layers=(0,))


def _chunk(key: ChunkKey, dtype: torch.dtype, codec: str, e_layers: tuple[int, ...]) -> Chunk:
    tensors = {slot: _tensor(key, slot, dtype, KV_HEADS, HEAD_DIM) for slot in Slot.kv(range(LAYERS))}
    tensors |= {slot: _tensor(key, slot, dtype, HIDDEN) for slot in (Slot(SlotKind.E, n) for n in e_layers)}
    return Chunk.encode(key, tensors, codec=codec, labels={"made-by": "golden", "note": "Grüße"})


def _tensor(key: ChunkKey, slot: Slot, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Bits without a pattern that a mistake could hit by chance; NaNs and infinities among them."""
    start = int(key.prefix[:6], 16) + 1_000 * slot.layer + ord(slot.kind.value)
    width = shape[-1] * dtype.itemsize
    size = TOKENS * width * (shape[0] if len(shape) > 1 else 1)
    numbers = torch.arange(start, start + size, dtype=torch.int64)
    # The odd bytes take few values, as the signs and exponents of a real cache do.
    values = torch.where(numbers % 2 == 0, numbers * numbers * 31 // 7 % 256, numbers // 64 % 5 + 60)
    return values.to(torch.uint8).view(TOKENS, *shape[:-1], width).view(dtype)


def main(root: Path) -> None:
    """Writes the files below `root`; of the rest of a store nothing is durable."""
    with DiskTier(root, min_free=0) as tier:
        for chunk in golden_chunks():
            tier.write(chunk)
    for path in root.iterdir():
        if path.name != "chunks":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.exists():
        sys.exit(f"{target} is there: a golden store is never made again")
    main(target)
