"""What the daemon takes of the machine: memory while it is written to, and for idle connections."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

from benchmarks.measure import table
from benchmarks.server.clients import LmClient, connected
from benchmarks.server.processes import Server, Watch, ours, resident
from benchmarks.server.throughput import MIB

__all__ = ["idle_connections", "resident_memory"]

_SIZE = 4 * MIB
_SETTLE = 2.0
_PATIENCE = 60.0


def resident_memory(capacities: tuple[int, ...]) -> tuple[str, float]:
    """A table, and the largest share of its capacity that a daemon had in memory, its start included."""
    rows, worst = [], 0.0
    for capacity in capacities:
        with ours(f"cpu://?capacity={capacity}") as server:
            start, peak = resident(server.pid), _written(server, 5 * capacity)
        worst = max(worst, peak / capacity)
        rows.append([_mib(capacity), _mib(start), _mib(peak), _mib(peak - start), f"{peak / capacity:.2f}"])
    columns = ["capacity", "at start", "peak", "peak above start", "peak / capacity"]
    return table(columns, rows), worst


def _written(server: Server, nbytes: int) -> int:
    value = memoryview(bytearray(_SIZE))
    client = LmClient(server.port, 0)
    with Watch(server.pid) as watch:
        for number in range(nbytes // _SIZE):
            client.put(number, value)
            client.settle(number, _SIZE)
    client.close()
    return watch.peak


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
