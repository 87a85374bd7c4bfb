"""Daemons to talk to: real ones, and servers that are none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from droidspeak.config import Address, TlsSettings, load_settings
from droidspeak.integrations.server.http import HttpServer
from droidspeak.integrations.server.state import DaemonState
from droidspeak.storage import TieredStore

__all__ = ["answering", "closed_port", "raw_server", "serving"]


@contextmanager
def serving(
    stores: TieredStore | Mapping[str, TieredStore],
    *,
    port: int = 0,
    tls: TlsSettings | None = None,
    **server: Any,
) -> Iterator[int]:
    """The port of an HTTP side over `stores`, which are closed afterwards.

    Args:
        port: any free one if 0.
        server: keys of the section of that name.
    """
    held = stores if isinstance(stores, Mapping) else {"": stores}
    settings = load_settings(overrides={"tiers": ["cpu://"], "server": server})
    state = DaemonState(settings, held)
    http = HttpServer(state, Address(host="127.0.0.1", port=port), tls)
    http.start()
    state.ready.set()
    try:
        yield http.port
    finally:
        http.stop(5)
        for store in held.values():
            store.close()


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def raw_server(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """The port of a server that hands each connection to `serve`, and then closes it."""
    open_now: set[socket.socket] = set()

    def handle(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            serve(connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                open_now.add(connection)
                threading.Thread(target=handle, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield int(server.getsockname()[1])
        finally:
            # Closing alone does not wake a thread that accepts.
            server.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            for connection in open_now:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def answering(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> Iterator[int]:
    """The port of an HTTP server that gives one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *_words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join(10)
