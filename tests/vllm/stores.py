"""Stores that engines and tests share, and a wire to one that can be cut."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Self

from droidspeak.storage import ChunkKey
from droidspeak.storage.disk import DiskTier

__all__ = ["Disk", "Wire", "wait_for"]

PATIENCE = 60.0


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Returns when `condition` holds; fails with `what` if it does not in time."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s for {what}"
        time.sleep(0.02)


class Disk:
    """A folder of chunks.

    Attributes:
        tier: on the folder, for the test.
        url: for engines.
    """

    def __init__(self, folder: Path) -> None:
        self.url = f"disk://{folder}?min_free=0"
        self.tier = DiskTier(folder, min_free=0)

    def keys(self) -> set[ChunkKey]:
        return set(self.tier.keys())

    def wait(self, keys: Iterable[ChunkKey]) -> None:
        """Returns when all `keys` are there."""
        expected = set(keys)
        wait_for(lambda: expected <= self.keys(), f"{len(expected)} chunks on disk")

    def file(self, key: ChunkKey) -> Path:
        return self.tier.path(key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.tier.close()


class Wire:
    """A TCP wire to `port`.

    Attributes:
        port: where it begins.
        budget: bytes that it still carries from the other end; beyond, it is cut, or stalls.
        stalls: whether it then only carries no more, instead of ending.
        then: what happens beyond, once, instead: the wire goes on carrying.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self.budget: int | None = None
        self.stalls = False
        self.then: Callable[[], object] | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def mend(self) -> None:
        """Carries everything again; what was cut or stalled stays so."""
        self.budget, self.stalls, self.then = None, False, None
        self._drop()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.budget is not None and self.budget <= 0 and not self.stalls:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # nobody listens, or whoever did was killed meanwhile
                near.close()
                continue
            with self._lock:
                self._sockets += [near, far]
            threading.Thread(target=self._carry, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._carry, args=(far, near, True), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if counted and not self._allowed(len(data)):
                    if self.stalls:
                        return
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _allowed(self, count: int) -> bool:
        with self._lock:
            if self.budget is None:
                return True
            self.budget -= count
            if self.budget < 0 and self.then is not None:
                self.then()
                self.budget = self.then = None
            return self.budget is None or self.budget >= 0

    def _drop(self) -> None:
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for end in sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._drop()
