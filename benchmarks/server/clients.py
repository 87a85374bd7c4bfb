"""Clients of what is measured. They know no torch: each is forked into a process of its own.

`LmClient` does on the wire what LMCache's client does (lmcache/v1/storage_backend/connector/lm_connector.py):
Nagle's algorithm stays on, a header and its body are sent apart, and bodies are received into memory that is
there already.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Protocol

__all__ = ["CLIENTS", "KEYS", "Client", "LmClient", "PlainClient", "connected", "receive"]

# Values per connection and size; as many for every server, so that processor caches favour none of them.
KEYS = 4
_TIMEOUT = 120.0


class Client(Protocol):
    """One connection; keys are small numbers."""

    def put(self, key: int, value: memoryview) -> None:
        """Sends `value`; that it has come is only known after `settle`, where the protocol is so."""

    def settle(self, key: int, size: int) -> None:
        """Waits until what was put is there. Raises `AssertionError` if the last one is not."""

    def get(self, key: int, into: memoryview) -> None:
        """Receives a value of exactly `into`'s size."""


def connected(port: int) -> socket.socket:
    """A connection to `port` of this machine."""
    return socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT)


def receive(connection: socket.socket, into: memoryview) -> None:
    """Fills `into`. Raises `EOFError` if the connection ends before."""
    filled = 0
    while filled < len(into):
        count = connection.recv_into(into[filled:])
        if not count:
            raise EOFError(f"connection ended after {filled} of {len(into)} bytes")
        filled += count


class LmClient:
    """LMCache's `lm://`: a PUT has no reply, so an EXIST after it tells that it was taken."""

    REQUEST, REPLY = struct.Struct("iiiiiiiii150s"), struct.Struct("iiiiiiiii")
    PUT, GET, EXIST = 1, 2, 3
    _T2D, _BFLOAT16 = 2, 3

    def __init__(self, port: int, number: int) -> None:
        self._socket, self._number = connected(port), number
        self._reply = memoryview(bytearray(self.REPLY.size))

    def put(self, key: int, value: memoryview) -> None:
        size = len(value)
        self._socket.sendall(self.header(self.PUT, key, size, size, (size // 256, 2, 64, 0)))
        self._socket.sendall(value)

    def settle(self, key: int, size: int) -> None:
        self._socket.sendall(self.header(self.EXIST, key, size))
        assert self._answer() == (200, 0)

    def get(self, key: int, into: memoryview) -> None:
        self._socket.sendall(self.header(self.GET, key, len(into)))
        assert self._answer() == (200, len(into))
        receive(self._socket, into)

    def header(
        self, command: int, key: int, size: int, length: int = 0, shape: tuple[int, ...] = (0, 0, 0, 0)
    ) -> bytes:
        """A request for the value `key` of `size` bytes, as this client numbers them."""
        name = f"bench/model@1@0@{size << 24 | self._number << 16 | key:x}@bfloat16"
        return self.REQUEST.pack(
            command, length, self._T2D, self._BFLOAT16, 0, *shape, name.encode().ljust(150)
        )

    def _answer(self) -> tuple[int, int]:
        receive(self._socket, self._reply)
        code, length, *_ = self.REPLY.unpack(self._reply)
        return code, length

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()


class RedisClient:
    """redis-py with hiredis: SET is acknowledged, GET makes new bytes."""

    def __init__(self, port: int, number: int) -> None:
        import redis

        self._redis, self._number = redis.Redis(port=port, socket_timeout=_TIMEOUT), number

    def put(self, key: int, value: memoryview) -> None:
        self._redis.set(self._name(key, len(value)), value)

    def settle(self, key: int, size: int) -> None:
        """Nothing: each SET was acknowledged."""

    def get(self, key: int, into: memoryview) -> None:
        value = self._redis.get(self._name(key, len(into)))
        assert isinstance(value, bytes)
        assert len(value) == len(into)
        into[:8] = value[:8]

    def _name(self, key: int, size: int) -> str:
        return f"{size}:{self._number}:{key}"


class PlainClient:
    """The limit: see `benchmarks.server.plain`, whose protocol this is."""

    REQUEST = struct.Struct("<4sIQ")
    PUT, SYNC, GET, FILE = b"put ", b"sync", b"get ", b"file"

    def __init__(self, port: int, number: int) -> None:  # noqa: ARG002 - the server's memory is per connection
        self._socket = connected(port)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._byte = memoryview(bytearray(1))
        self._get = self.GET

    def put(self, key: int, value: memoryview) -> None:
        header = self.REQUEST.pack(self.PUT, key, len(value))
        sent = self._socket.sendmsg([header, value]) - len(header)
        self._socket.sendall(value[sent:])

    def settle(self, key: int, size: int) -> None:
        self._socket.sendall(self.REQUEST.pack(self.SYNC, key, size))
        receive(self._socket, self._byte)

    def get(self, key: int, into: memoryview) -> None:
        self._socket.sendall(self.REQUEST.pack(self._get, key, len(into)))
        receive(self._socket, into)


class PlainFileClient(PlainClient):
    """As `PlainClient`, but what is got lies in a file."""

    def __init__(self, port: int, number: int) -> None:
        super().__init__(port, number)
        self._get = self.FILE


CLIENTS: dict[str, Callable[[int, int], Client]] = {
    "raw": PlainClient,
    "redis": RedisClient,
    "stock": LmClient,
    "ours": LmClient,
    "pread + send": PlainFileClient,
}
