"""A raw `lm://` client: what LMCache's sends, and everything that it never would."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

REQUEST = struct.Struct("iiiiiiiii150s")
REPLY = struct.Struct("iiiiiiiii")
PUT, GET, EXIST, LIST, HEALTH = 1, 2, 3, 4, 5
UINT8, BFLOAT16 = 6, 3
KV_2LTD, KV_T2D, BINARY = 1, 2, 4
PATIENCE = 60.0  # seconds; a deadline against hanging, never what is measured


class Reply(NamedTuple):
    """A reply's header, in the wire's order."""

    code: int
    length: int
    fmt: int
    dtype: int
    s0: int
    s1: int
    s2: int
    s3: int
    location: int


MISS = Reply(400, 0, 1, 2, 0, 0, 0, 0, 0)
HIT = Reply(200, 0, 1, 2, 0, 0, 0, 0, 0)


def frame(
    command: int,
    key: bytes = b"m@1@0@1f@bfloat16",
    *,
    length: int = 0,
    fmt: int = KV_2LTD,
    dtype: int = 2,
    shape: Sequence[int] = (0, 0, 0, 0),
    location: int = 0,
) -> bytes:
    """A request's header; nothing is checked."""
    padded = (*shape, 0, 0, 0, 0)[:4]
    return REQUEST.pack(command, length, fmt, dtype, location, *padded, key.ljust(150))


def put_frame(key: bytes, body: bytes) -> bytes:
    """A whole PUT of `body` as a tensor of bytes, `[2, 1, 1, len / 2]`, or flat where it is odd."""
    if len(body) % 2:
        return frame(PUT, key, length=len(body), fmt=BINARY, dtype=UINT8, shape=(len(body),)) + body
    return frame(PUT, key, length=len(body), dtype=UINT8, shape=(2, 1, 1, len(body) // 2)) + body


class WireClient:
    """One connection. Receiving raises `EOFError` when the daemon closed it."""

    def __init__(self, port: int, *, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(("127.0.0.1", port))
        # The stock client leaves Nagle's algorithm on; these tests are about bytes, not about their pace.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, count: int) -> bytes:
        received = bytearray()
        while len(received) < count:
            part = self.socket.recv(count - len(received))
            if not part:
                raise EOFError(f"closed after {len(received)} of {count} bytes")
            received += part
        return bytes(received)

    def reply(self) -> Reply:
        return Reply(*REPLY.unpack(self.receive(REPLY.size)))

    def put(self, key: bytes, body: bytes) -> None:
        self.send(put_frame(key, body))

    def get(self, key: bytes) -> bytes | None:
        self.send(frame(GET, key))
        reply = self.reply()
        return self.receive(reply.length) if reply.code == 200 else None

    def exist(self, key: bytes) -> bool:
        self.send(frame(EXIST, key))
        return self.reply().code == 200

    def health(self) -> Reply:
        self.send(frame(HEALTH))
        return self.reply()

    def end(self) -> bytes:
        """Says that nothing more comes, and gives what the daemon still sends until it closes."""
        rest = bytearray()
        with suppress(OSError):  # closed already; what it has sent before can still be received
            self.socket.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while part := self.socket.recv(1 << 16):
                rest += part
        return bytes(rest)

    def is_closed(self) -> bool:
        """Waits for the daemon to close; `False` if it sends something instead."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def wait_until(condition: Callable[[], bool], what: str = "") -> None:
    """Returns when `condition()` holds; fails after `PATIENCE` s."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.01)


class DaemonProcess:
    """`python -m droidspeak serve` in a process of its own, to be measured and killed."""

    def __init__(self, *arguments: str, port: int = 0, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "droidspeak", "serve", "127.0.0.1", str(port), *arguments]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline().strip()
        if not self.ready.startswith("READY "):
            self.kill()
            raise AssertionError(f"not ready: {self.ready!r} {self.errors}")
        places = dict(place.split("=") for place in self.ready.split()[1:])
        self.ports = {name: int(address.rpartition(":")[2]) for name, address in places.items()}

    @property
    def port(self) -> int:
        return self.ports["lm"]

    def memory(self, field: str = "VmRSS") -> int:
        """Bytes of `VmRSS` (now) or `VmHWM` (the most so far)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
        return 1024 * int(line.split()[1])

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        """`kill -9`."""
        self.process.kill()
        self._collect()

    def wait(self) -> int:
        """The exit status."""
        self._collect()
        return self.process.returncode

    def _collect(self) -> None:
        out, self.errors = self.process.communicate(timeout=PATIENCE)
        self.output = out


@contextmanager
def daemon_process(
    *arguments: str, port: int = 0, environment: dict[str, str] | None = None
) -> Iterator[DaemonProcess]:
    """A daemon that is killed at the end, if it still runs then."""
    daemon = DaemonProcess(*arguments, port=port, environment=environment)
    try:
        yield daemon
    finally:
        if daemon.process.returncode is None:
            daemon.kill()
