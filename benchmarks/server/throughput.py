"""Puts and gets over loopback: objects per second of each server, by size and number of connections.

Every connection is a process of its own. All servers run and all clients are connected the whole time; in
each round they take turns in a new random order, so what disturbs the machine disturbs all of them.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier

from benchmarks.measure import Series
from benchmarks.server.clients import CLIENTS, KEYS, Client

__all__ = ["MIB", "Case", "Plan", "Team", "measure", "objects"]

MIB = 1 << 20
_FORK = multiprocessing.get_context("fork")
_WAIT = 300.0


@dataclass(frozen=True, order=True)
class Case:
    """What is done: `put`, `put_ack` or `get`, of values of `size` bytes, over `connections`."""

    operation: str
    connections: int
    size: int


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: of each case.
        volume: bytes per case, round and server, at least two values per connection.
        acknowledged: values per connection at most where each waits for its acknowledgement, since a
            server may need 44 ms for each.
    """

    sizes: Sequence[int]
    connections: Sequence[int]
    operations: Sequence[str] = ("put", "put_ack", "get")
    rounds: int = 7
    volume: int = 128 * MIB
    acknowledged: Mapping[str, int] | None = None


def objects(plan: Plan, case: Case, server: str) -> int:
    """Values per connection, in one round."""
    count = max(2, plan.volume // case.size // case.connections)
    if case.operation == "put_ack" and plan.acknowledged:
        count = min(count, plan.acknowledged.get(server, count))
    return count


@dataclass(frozen=True)
class _Order:
    operation: str
    size: int
    count: int


class Team:
    """Some connections to one server, each in a process of its own, that do the same at the same time."""

    def __init__(self, kind: str, port: int, connections: int, keys: int = KEYS) -> None:
        self._start = _FORK.Barrier(connections)
        self._lines: list[Connection] = []
        self._processes = []
        for number in range(connections):
            line, far = _FORK.Pipe()
            process = _FORK.Process(
                target=_work, args=(kind, port, number, keys, far, self._start), daemon=True
            )
            process.start()
            far.close()
            self._lines.append(line)
            self._processes.append(process)

    def run(self, operation: str, size: int, count: int) -> float:
        """Seconds from the first one's start to the last one's end; `count` values each."""
        for line in self._lines:
            line.send(_Order(operation, size, count))
        spans = [self._answer(line) for line in self._lines]
        return max(end for _, end in spans) - min(start for start, _ in spans)

    def _answer(self, line: Connection) -> tuple[float, float]:
        if not line.poll(_WAIT):
            raise TimeoutError("a client does not answer")
        start, end = line.recv()
        return start, end

    def close(self) -> None:
        """Ends the processes."""
        for line in self._lines:
            line.send(None)  # those forked later hold this end too, so closing it would tell nobody
        for process in self._processes:
            process.join(10)


def _work(kind: str, port: int, number: int, keys: int, orders: Connection, start: Barrier) -> None:
    client = CLIENTS[kind](port, number)
    memory = memoryview(bytearray(16 * MIB))
    values: dict[int, memoryview] = {}
    while order := orders.recv():
        value = values.get(order.size) or values.setdefault(order.size, _value(order.size))
        act = _ACTIONS[order.operation]
        start.wait(_WAIT)
        began = time.perf_counter()
        act(client, order.count, keys, value, memory[: order.size])
        orders.send((began, time.perf_counter()))


def _value(size: int) -> memoryview:
    block = os.urandom(1 << 16)
    return memoryview(bytearray(block * (size // len(block))))


def _put(client: Client, count: int, keys: int, value: memoryview, into: memoryview) -> None:  # noqa: ARG001
    for turn in range(count):
        client.put(turn % keys, value)
    client.settle((count - 1) % keys, len(value))


def _put_ack(client: Client, count: int, keys: int, value: memoryview, into: memoryview) -> None:  # noqa: ARG001
    for turn in range(count):
        client.put(turn % keys, value)
        client.settle(turn % keys, len(value))


def _get(client: Client, count: int, keys: int, value: memoryview, into: memoryview) -> None:  # noqa: ARG001
    for turn in range(count):
        client.get(turn % keys, into)


def _fill(client: Client, count: int, keys: int, value: memoryview, into: memoryview) -> None:  # noqa: ARG001
    """Puts each key's own value, and sees that this one comes back."""
    for key in range(keys):
        value[:8] = key.to_bytes(8, "little")
        client.put(key, value)
        client.settle(key, len(value))
    for key in range(keys):
        into[:8] = bytes(8)
        client.get(key, into)
        assert into[:8] == key.to_bytes(8, "little")


_ACTIONS: dict[str, Callable[[Client, int, int, memoryview, memoryview], None]] = {
    "fill": _fill,
    "put": _put,
    "put_ack": _put_ack,
    "get": _get,
}


@contextmanager
def _teams(ports: Mapping[str, int], connections: int) -> Iterator[dict[str, Team]]:
    with ExitStack() as undo:
        teams = {}
        for name, port in ports.items():
            teams[name] = Team(name, port, connections)
            undo.callback(teams[name].close)
        yield teams


def measure(
    plan: Plan, ports: Mapping[str, int], report: Callable[[Case, Mapping[str, Series]], None]
) -> dict[Case, dict[str, Series]]:
    """Seconds per value of each server in `ports`, in every case; round by round side by side."""
    found = {}
    for connections in plan.connections:
        with _teams(ports, connections) as teams:
            for size in plan.sizes:
                for team in teams.values():
                    team.run("fill", size, KEYS)
                for operation in plan.operations:
                    case = Case(operation, connections, size)
                    found[case] = _measure(plan, case, teams)
                    report(case, found[case])
    return found


def _measure(plan: Plan, case: Case, teams: Mapping[str, Team]) -> dict[str, Series]:
    shuffle = random.Random(repr(case)).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in teams}
    for turn in range(plan.rounds + 1):
        order = list(teams)
        shuffle(order)
        for name in order:
            count = objects(plan, case, name)
            took = teams[name].run(case.operation, case.size, count)
            if turn:  # the first one warms up
                seconds[name].append(took / count / case.connections)
    return {name: Series(tuple(values)) for name, values in seconds.items()}
