"""The servers that are measured, each a process of its own, ended by its process id."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Server", "Watch", "ours", "plain", "redis", "resident", "stock"]

_START = 60.0
_ENV = os.environ | {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_LOG_LEVEL": "WARNING", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Server:
    """A server that answers on `port` of this machine."""

    name: str
    pid: int
    port: int


@contextmanager
def ours(*tiers: str, options: Sequence[str] = ()) -> Iterator[Server]:
    """`droidspeak serve` on `tiers`."""
    command = ["-m", "droidspeak", "serve", "127.0.0.1", "0", "--no-http", "--log-level", "warning"]
    command += [part for tier in tiers for part in ("--tier", tier)]
    with _announced("ours", [sys.executable, *command, *options]) as server:
        yield server


@contextmanager
def plain(folder: Path | None = None) -> Iterator[Server]:
    """See `benchmarks.server.plain`."""
    command = [sys.executable, "-m", "benchmarks.server.plain", *([str(folder)] if folder else [])]
    with _announced("raw", command) as server:
        yield server


@contextmanager
def stock() -> Iterator[Server]:
    """LMCache's own server."""
    port = _free_port()
    command = [sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(port)]
    with _process(command) as process:
        _await_listening(process, port)
        yield Server("stock", process.pid, port)


@contextmanager
def redis() -> Iterator[Server]:
    """Redis without persistence."""
    program = shutil.which("redis-server")
    if program is None:
        sys.exit("redis-server is not installed; it is one of the servers compared")
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
        with _process([*command, "--save", "", "--appendonly", "no"]) as process:
            _await_listening(process, port)
            yield Server("redis", process.pid, port)


@contextmanager
def _announced(name: str, command: list[str]) -> Iterator[Server]:
    """A server that prints `READY ...=HOST:PORT`."""
    with _process(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        ready = re.match(r"READY \w+=[\d.]+:(\d+)", line)
        if ready is None:
            raise RuntimeError(f"{name} did not start: {line!r}")
        yield Server(name, process.pid, int(ready[1]))


@contextmanager
def _process(command: list[str], stdout: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=stdout, stderr=subprocess.DEVNULL, env=_ENV, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _await_listening(process: subprocess.Popen[str], port: int) -> None:
    end = time.monotonic() + _START
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"{process.args!r} does not listen")


def resident(pid: int) -> int:
    """Bytes of `pid` in memory (VmRSS)."""
    status = Path(f"/proc/{pid}/status").read_text()
    (kibibytes,) = re.findall(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kibibytes) << 10


class Watch:
    """Looks at a process's memory every few milliseconds; `peak` is the most that was seen, in bytes."""

    def __init__(self, pid: int, interval: float = 0.01) -> None:
        self._pid, self._interval = pid, interval
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.peak = resident(pid)

    def _look(self) -> None:
        while not self._over.wait(self._interval):
            self.peak = max(self.peak, resident(self._pid))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
