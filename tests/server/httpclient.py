"""An HTTP side over real stores on a real socket, and clients that say anything at all."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import urllib3

from droidspeak.config import Address, TlsSettings, load_settings
from droidspeak.integrations.server.http import HttpServer
from droidspeak.integrations.server.state import DaemonState
from droidspeak.storage import Chunk, ChunkKey, Limits, Tier, TieredStore
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.memory import MemoryTier

MIB = 1 << 20
PATIENCE = 60.0


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def refusal(self) -> tuple[int, str]:
        """Status and reason of an error answer."""
        error = self.json["error"]
        assert set(self.json) == {"error"}
        assert set(error) == {"reason", "message"}
        assert error["message"]
        assert "\n" not in error["message"]
        return self.status, error["reason"]


class HttpClient:
    """Requests to one server.

    Args:
        token: sent with every request, if there is one.
    """

    def __init__(self, port: int, token: str | None = None) -> None:
        self.port, self._token = port, token
        self._pool = urllib3.PoolManager(retries=False, timeout=PATIENCE)

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        sent = dict(headers or {})
        if self._token:
            sent["Authorization"] = f"Bearer {self._token}"
        if isinstance(body, dict):
            body, sent["Content-Type"] = json.dumps(body), "application/json"
        answer = self._pool.request(method, f"http://127.0.0.1:{self.port}{path}", body=body, headers=sent)
        return Answer(answer.status, answer.headers, answer.data)

    def put(self, chunk: Chunk) -> None:
        assert self.ask("PUT", path_of(chunk.key), chunk.to_bytes()).status == 204

    def close(self) -> None:
        self._pool.clear()


def path_of(key: ChunkKey) -> str:
    return f"/v1/chunks/{key}"


class Serving(NamedTuple):
    """A server, what it serves, and a client of it."""

    server: HttpServer
    state: DaemonState
    client: HttpClient

    @property
    def store(self) -> TieredStore:
        return self.state.stores[""]

    def events(self, name: str, label: str | None = None) -> int:
        """A counter of the HTTP side."""
        return self.server.counters.get(name, label)

    def as_caller(self, token: str) -> HttpClient:
        return HttpClient(self.server.port, token)


def store_of(*tiers: Tier, name: str = "store", **options: Any) -> TieredStore:
    """A store that never gives a tier up, so that each call shows what a tier does."""
    limits = {tier.name: Limits(threshold=10**6) for tier in tiers}
    return TieredStore(tiers, limits=limits, name=name, **options)


def disk(folder: Path, **options: Any) -> DiskTier:
    return DiskTier(folder, min_free=0, **options)


def memory(capacity: int = 64 * MIB) -> MemoryTier:
    return MemoryTier(capacity)


@contextmanager
def serving(
    stores: TieredStore | Mapping[str, TieredStore], *, tls: TlsSettings | None = None, **server: Any
) -> Iterator[Serving]:
    """Serves until the end of the block, then closes the stores. `server`: settings of that section."""
    held = stores if isinstance(stores, Mapping) else {"": stores}
    tenants = {name: {"tiers": ["cpu://"]} for name in held if name}
    section = {"stall_timeout": PATIENCE, "header_timeout": PATIENCE, "tenants": tenants, **server}
    state = DaemonState(load_settings(overrides={"tiers": ["cpu://"], "server": section}), held)
    http_side = HttpServer(state, Address(host="127.0.0.1", port=0), tls)
    http_side.start()
    state.ready.set()
    client = HttpClient(http_side.port)
    try:
        yield Serving(http_side, state, client)
    finally:
        client.close()
        http_side.stop(PATIENCE)
        for store in held.values():
            store.close()


@contextmanager
def connection(port: int, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """A plain socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as plain:
        if receive_buffer is not None:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        plain.settimeout(PATIENCE)
        plain.connect(("127.0.0.1", port))
        yield plain


def answer_on(plain: socket.socket) -> Answer:
    """The next answer on a plain socket."""
    response = http.client.HTTPResponse(plain)
    response.begin()
    return Answer(response.status, response.headers, response.read())


def say(port: int, *lines: str, body: bytes = b"") -> Answer:
    """The answer to exactly these lines, of which the first is the request line."""
    head = "".join(f"{line}\r\n" for line in lines)
    with connection(port) as plain:
        plain.sendall(head.encode("latin-1") + b"Host: localhost\r\n\r\n" + body)
        return answer_on(plain)


def is_closed(plain: socket.socket) -> bool:
    """Waits for the server's end of the connection, whatever comes before it."""
    try:
        while plain.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def lines_of(answer: Answer) -> Sequence[Any]:
    """The objects of a listing."""
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.body.splitlines()]
