"""`droidspeak store verify --full` against a plain sequential read of the same files.

`python -m benchmarks.verify` writes its section of docs/benchmarks/store.md.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from textwrap import fill

import torch

from benchmarks.measure import Series, interleaved, machine, put_section, table
from benchmarks.storecli import HEADING, PAGE
from droidspeak.storage import Chunk, ChunkKey, PrefixHasher, Slot, SlotKind, SourceId
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.verify import VerifyCounts, VerifyOptions
from droidspeak.storage.verifydisk import verify_folder

TITLE = "## verify --full"
TARGET = 0.8
_LAYERS, _TOKENS, _HEADS, _HEAD_DIM, _HIDDEN = 32, 256, 8, 128, 4096
_CHUNKS, _ROUNDS = 48, 9
_PIECE = 1 << 20


def _fill(root: Path) -> list[Path]:
    """Chunks of an 8B model in bfloat16, each with the E of one layer; their files, on the disk."""
    prefixes = PrefixHasher(16).hashes(list(range(16 * _CHUNKS)))
    paths = []
    with DiskTier(root, min_free=0) as tier:
        for seed, prefix in enumerate(prefixes):
            generator = torch.Generator().manual_seed(seed)
            tensors = {
                slot: torch.randn(_TOKENS, _HEADS, _HEAD_DIM, generator=generator).bfloat16()
                for slot in Slot.kv(range(_LAYERS))
            }
            tensors[Slot(SlotKind.E, 11)] = torch.randn(_TOKENS, _HIDDEN, generator=generator).bfloat16()
            key = ChunkKey(SourceId("a" * 64), "0of1", prefix)
            tier.write(Chunk.encode(key, tensors))
            paths.append(tier.path(key))
    for path in paths:
        _with_file(path, os.fsync)
    return paths


def _with_file(path: Path, call: Callable[[int], object]) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        call(file)
    finally:
        os.close(file)


def _forget(paths: list[Path]) -> None:
    """Takes the files out of the page cache."""
    for path in paths:
        _with_file(path, lambda file: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED))


def _plain(paths: list[Path]) -> None:
    """What any tool must do: every byte, one file after the other, into one buffer."""
    buffer = memoryview(bytearray(_PIECE))

    def read(file: int) -> None:
        offset = 0
        while done := os.preadv(file, [buffer], offset):
            offset += done

    for path in paths:
        _with_file(path, read)


def _ours(root: Path, chunks: int, *, full: bool) -> None:
    counts = VerifyCounts()

    def never() -> DiskTier:
        raise AssertionError("nothing is to be repaired")

    assert not list(verify_folder(root, "disk", VerifyOptions(full=full), counts, never))
    assert counts.chunks == chunks


def _measured(root: Path, paths: list[Path]) -> dict[str, dict[str, Series]]:
    calls = {"plain read": lambda: _plain(paths), "verify --full": lambda: _ours(root, _CHUNKS, full=True)}
    warm = interleaved({**calls, "verify": lambda: _ours(root, _CHUNKS, full=False)}, rounds=_ROUNDS)
    # Forgetting takes its turn like the others, so that each of them finds the cache empty.
    cold_calls: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        cold_calls[f"forget before {name}"] = lambda: _forget(paths)
        cold_calls[name] = call
    cold = interleaved(cold_calls, rounds=_ROUNDS)
    return {"warm": warm, "dropped": {name: cold[name] for name in calls}}


def run() -> str:
    """The section of the page."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        paths = _fill(root)
        nbytes = sum(path.stat().st_size for path in paths)
        load = os.getloadavg()[0]
        measured = _measured(root, paths)
    rows, ratios = [], []
    for cache, series in measured.items():
        for name, told in series.items():
            against = told.ratio(series["plain read"])
            rate = "-" if name == "verify" else told.rate(nbytes)
            rows.append([cache, name, told.spread(), rate, "-" if name == "verify" else f"{against:.2f}"])
            if name == "verify --full":
                ratios.append(against)
    head = ["page cache", "", "ms, median (min-max)", "GB/s", "of plain read"]
    met = "met" if min(ratios) >= TARGET else "missed"
    about = (
        f"{_CHUNKS} chunks, {nbytes / 2**30:.2f} GiB, {_ROUNDS} rounds in turn; load average before:"
        f" {load:.1f}. The plain read is one thread with one buffer of 1 MiB; `verify --full` also checks"
        " every xxh3-64, two files at a time. `dropped`: the files were taken out of the page cache before"
        f" each read. Target: {TARGET} of the plain read; {met}."
    )
    return f"{TITLE}\n\n{fill(about, 110)}\n\n{table(head, rows)}\n\n{machine()}.\n"


def main() -> None:
    """Prints the section and puts it into the page, in the place of an older one."""
    section = run()
    print(section)
    put_section(PAGE, HEADING, TITLE, section)


if __name__ == "__main__":
    main()
