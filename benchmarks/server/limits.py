"""What the daemon takes of the machine: memory while it is written to, and for idle connections."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

from benchmarks.measure import table
from benchmarks.server.clients import LmClient, connected
from benchmarks.server.processes import Server, Watch, ours, resident
from benchmarks.server.throughput import MIB

__all__ = ["idle_connections", "resident_memory"]

_FORK = multiprocessing.get_context("fork")
_WRITERS = 4
_SIZES = {"4 MiB": (4 * MIB,), "256 KiB to 16 MiB": (MIB // 4, MIB, 4 * MIB, 16 * MIB)}
_SETTLE = 2.0


def resident_memory(capacities: tuple[int, ...]) -> tuple[str, dict[str, float]]:
    """A table, and the largest shares of its capacity that a daemon held: in all, and above its start."""
    rows, whole, grown = [], [], []
    for capacity in capacities:
        for what, sizes in _SIZES.items():
            with ours(f"cpu://?capacity={capacity}") as server:
                start, peak = resident(server.pid), _written(server, 5 * capacity, sizes)
            whole.append(peak / capacity)
            grown.append((peak - start) / capacity)
            shares = f"{whole[-1]:.2f}", f"{grown[-1]:.2f}"
            rows.append([_mib(capacity), what, _mib(start), _mib(peak), _mib(peak - start), *shares])
    columns = [
        "capacity",
        "objects",
        "at start",
        "peak",
        "above start",
        "peak / capacity",
        "above / capacity",
    ]
    return table(columns, rows), {"resident memory": max(whole), "memory above start": max(grown)}


def _written(server: Server, nbytes: int, sizes: tuple[int, ...]) -> int:
    """The most memory that was seen while several clients wrote `nbytes` together."""
    share = nbytes // _WRITERS
    writers = [_FORK.Process(target=_write, args=(server.port, n, share, sizes)) for n in range(_WRITERS)]
    with Watch(server.pid) as watch:
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
    if any(writer.exitcode for writer in writers):
        raise RuntimeError("a client failed while it wrote")
    return watch.peak


def _write(port: int, number: int, nbytes: int, sizes: tuple[int, ...]) -> None:
    client, chosen = LmClient(port, number), random.Random(number)
    value = memoryview(bytearray(max(sizes)))
    for key in itertools.count():
        size = chosen.choice(sizes)
        client.put(key, value[:size])
        client.settle(key, size)
        nbytes -= size
        if nbytes <= 0:
            return


def idle_connections(count: int, halves: int) -> tuple[str, int]:
    """A table, and the bytes that `count` connections which say nothing cost."""
    header = LmClient.REQUEST.pack(LmClient.GET, 0, 1, 2, 0, 0, 0, 0, 0, b"half".ljust(150))
    # The half ones must last for as long as they are looked at.
    with ours("cpu://?capacity=64MiB", options=["--set", "server.header_timeout=120"]) as server:
        idle = _growth(server, count, lambda _: None)
    with ours("cpu://?capacity=64MiB", options=["--set", "server.header_timeout=120"]) as server:
        half = _growth(server, halves, lambda connection: connection.sendall(header[:90]))
    rows = [
        [f"{count:,} that say nothing", _mib(idle), f"{idle / count / 1024:.0f}"],
        [f"{halves:,} that sent half a header", _mib(half), f"{half / halves / 1024:.0f}"],
    ]
    return table(["connections", "memory", "KiB for each"], rows), idle


def _growth(server: Server, count: int, say: Callable[[socket.socket], None]) -> int:
    _await(server)
    before = resident(server.pid)
    with ExitStack() as undo:
        for _ in range(count):
            connection = undo.enter_context(connected(server.port))
            say(connection)
        time.sleep(_SETTLE)
        # All of them are served, not only queued by the kernel: one more is answered after them.
        _await(server)
        return resident(server.pid) - before


def _await(server: Server) -> None:
    client = LmClient(server.port, 1)
    client.put(0, memoryview(bytearray(1 << 16)))
    client.settle(0, 1 << 16)
    client.close()


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:,.0f} MiB"
