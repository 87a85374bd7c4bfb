"""The HTTP server: uvicorn on an event loop of its own, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from functools import partial
from typing import Any

import anyio.to_thread
import uvicorn

from droidspeak.config import Address, TlsSettings
from droidspeak.integrations.server.http.app import make_app
from droidspeak.integrations.server.http.connection import BoundedProtocol
from droidspeak.integrations.server.listener import listening
from droidspeak.integrations.server.state import DaemonState
from droidspeak.integrations.server.tls import server_context
from droidspeak.storage import Counters

__all__ = ["HttpServer"]

_log = logging.getLogger(__name__)
_KEEP_ALIVE = 60
_START_SECONDS = 30.0
_BREAK_OFF_SECONDS = 5.0


class HttpServer:
    """Serves `state` on `address` from `start` to `stop`.

    Args:
        address: port 0 takes a free one.
        tls: `None` for plain HTTP; with a client CA, clients must show a certificate.

    Attributes:
        port: the real one, once started.
        counters: what the HTTP side counts, see `DaemonCollector`.
    """

    def __init__(self, state: DaemonState, address: Address, tls: TlsSettings | None = None) -> None:
        self.port = address.port
        self.counters = Counters()
        self._state, self._address, self._tls = state, address, tls

    def start(self) -> None:
        """Begins to serve.

        Raises:
            ConfigError: it cannot listen there, or the certificate cannot be used.
        """
        config = self._config()
        if self._tls:
            config.ssl = server_context(self._tls)
        self._socket = listening(self._address)
        self.port = self._socket.getsockname()[1]
        self._server = _Server(config)
        name = f"droidspeak-http-{self.port}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        if not self._server.up.wait(_START_SECONDS):
            raise RuntimeError("the HTTP server did not start; see the log")

    def stop(self, timeout: float) -> None:
        """Accepts no more, lets requests end for `timeout` s, and breaks the rest off."""
        self._server.should_exit = True
        self._thread.join(timeout)
        if self._thread.is_alive():
            _log.warning("%d HTTP connections broken off", len(self._server.server_state.connections))
            self._loop.call_soon_threadsafe(self._server.break_off)
            self._thread.join(_BREAK_OFF_SECONDS)
            # A request that waits for a tier ends with the tier's own deadline.
            self._server.force_exit = True

    def _config(self) -> uvicorn.Config:
        server = self._state.settings.server
        protocol: Any = partial(
            BoundedProtocol,
            header_timeout=server.header_timeout,
            stall_timeout=server.stall_timeout,
            counters=self.counters,
        )
        config = uvicorn.Config(
            make_app(self._state, self.counters),
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=server.max_connections,
            timeout_keep_alive=_KEEP_ALIVE,
        )
        config.load()
        return config

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        # A request takes one thread at most, also while it waits for the budget: none waits for another's.
        limiter = anyio.to_thread.current_default_thread_limiter()
        limiter.total_tokens = self._state.settings.server.max_connections
        await self._server.serve(sockets=[self._socket])


class _Server(uvicorn.Server):
    """Says when it is up. uvicorn takes signals over in the main thread only, where this never runs."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.up.set()

    def break_off(self) -> None:
        """Ends all connections at once."""
        for connection in list(self.server_state.connections):
            if isinstance(connection, BoundedProtocol):
                connection.break_off("drained")
