"""GET of what lies on disk: the daemon against a process that reads the same bytes and sends them."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.measure import Series, table
from benchmarks.server.clients import LmClient
from benchmarks.server.processes import ours, plain
from benchmarks.server.throughput import MIB, Team

__all__ = ["spilled"]

_VOLUME = 192 * MIB
_MEMORY = 32 * MIB


def spilled(sizes: Sequence[int], rounds: int) -> tuple[str, list[float]]:
    """A table, and the ratios to pread + send, by size. The page cache is warm for both."""
    rows, ratios = [], []
    for size in sizes:
        series = _measure(size, rounds)
        ratio = series["ours"].ratio(series["pread + send"])
        ratios.append(ratio)
        cells = [f"{series[name].spread(1e3, 2)}" for name in ("pread + send", "ours")]
        rows.append([f"{size // MIB} MiB", *cells, series["ours"].rate(size), f"{ratio:.2f}"])
    return table(["object", "pread + send, ms", "ours, ms", "ours, GB/s", "ours / limit"], rows), ratios


def _measure(size: int, rounds: int) -> dict[str, Series]:
    count = max(8, _VOLUME // size)
    with ExitStack() as undo:
        folder = Path(tempfile.mkdtemp())
        undo.callback(shutil.rmtree, folder)
        tiers = f"cpu://?capacity={_MEMORY}", f"disk://{folder}/store?capacity=8GiB&min_free=0"
        # Promotion would copy each object into memory behind its GET; what is measured here is the disk.
        server = undo.enter_context(ours(*tiers, options=["--set", "promote=false"]))
        limit = undo.enter_context(plain(folder))
        _fill(server.port, folder, size, count)
        teams = {
            "ours": Team("ours", server.port, 1, keys=count),
            "pread + send": Team("pread + send", limit.port, 1, keys=count),
        }
        for team in teams.values():
            undo.callback(team.close)
        return _rounds(teams, size, count, rounds)


def _fill(port: int, folder: Path, size: int, count: int) -> None:
    client, block = LmClient(port, 0), random.Random(size).randbytes(1 << 16)
    value = memoryview(bytearray(block * (size // len(block))))
    for key in range(count):
        client.put(key, value)
        client.settle(key, size)
        (folder / f"{size}-{key}").write_bytes(value)
    client.close()


def _rounds(teams: dict[str, Team], size: int, count: int, rounds: int) -> dict[str, Series]:
    seconds: dict[str, list[float]] = {name: [] for name in teams}
    # The last ones written still lie in memory: only the first are asked for.
    asked = count - _MEMORY // size - 1
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample(list(teams), len(teams)):
            took = teams[name].run("get", size, asked)
            if turn:
                seconds[name].append(took / asked)
    return {name: Series(tuple(values)) for name, values in seconds.items()}
