"""The daemon: listeners and HTTP over the tenants' stores, from opening to the last flush."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self

from droidspeak.config import Address, Settings, open_store, open_tiers
from droidspeak.integrations.server.buffers import Buffers
from droidspeak.integrations.server.channel import Channel
from droidspeak.integrations.server.listener import Crowd, Listener
from droidspeak.integrations.server.session import Session
from droidspeak.integrations.server.state import DEFAULT_TENANT, DaemonState
from droidspeak.integrations.server.tls import server_context
from droidspeak.storage import TieredStore

__all__ = ["Daemon"]

_log = logging.getLogger(__name__)


class Daemon:
    """Serves from entering to leaving, or from `start` to `stop`.

    Attributes:
        state: what is counted, and the stores.
        addresses: where it listens: `lm`, `lm.TENANT`, `http`; with the real ports, once started.

    Raises:
        ConfigError, MissingExtra: from `start`: a tier, a certificate or an address that cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.addresses: dict[str, Address] = {}
        self._settings = settings
        self.state = DaemonState(settings, {})
        self._buffers = Buffers()
        self._crowd = Crowd(settings.server.max_connections, self.state.counters)
        self._listeners: list[Listener] = []
        self._undo = ExitStack()

    @property
    def ports(self) -> dict[str, int]:
        """The real ports, by the names of `addresses`."""
        return {name: address.port for name, address in self.addresses.items()}

    def start(self) -> None:
        """Opens the stores and begins to serve; leaves nothing open if that fails."""
        with ExitStack() as undo:
            self._open(undo)
            self._undo = undo.pop_all()
        self.state.ready.set()

    def _open(self, undo: ExitStack) -> None:
        server = self._settings.server
        self.state.stores = _open_stores(self._settings, undo)
        self.state.connections = lambda: self._crowd.size
        self._drain, self._draining = os.pipe()
        undo.callback(os.close, self._drain)
        # Closing the writing end makes the reading one readable, for all who wait.
        undo.callback(self._close_listeners)
        undo.callback(os.close, self._draining)
        channel = partial(
            Channel,
            tick=min(server.header_timeout, server.stall_timeout, server.idle_timeout or math.inf),
            tls=server_context(server.tls) if server.tls else None,
        )
        for name, tenant, address in self._places():
            listener = Listener(address, partial(self._serve, tenant), self._crowd, self._drain, channel)
            self._listeners.append(listener)
            self.addresses[name] = listener.address
        if server.http:
            self._open_http(server.http, undo)
        for listener in self._listeners:
            listener.start()

    def _places(self) -> list[tuple[str, str, Address]]:
        server = self._settings.server
        tenants = [
            (f"lm.{name}", name, tenant.listen) for name, tenant in server.tenants.items() if tenant.listen
        ]
        return [("lm", DEFAULT_TENANT, server.listen), *tenants]

    def _open_http(self, address: Address, undo: ExitStack) -> None:
        from droidspeak.integrations.server.http import HttpServer

        http = HttpServer(self.state, address, self._settings.server.tls)
        http.start()
        undo.callback(http.stop, self._settings.server.drain_timeout)
        self.addresses["http"] = Address(host=address.host, port=http.port)

    def _serve(self, tenant: str, channel: Channel) -> None:
        Session(
            channel,
            tenant,
            self.state.stores[tenant],
            settings=self._settings.server,
            codec=self._settings.codec,
            counters=self.state.counters,
            budget=self.state.budget,
            buffers=self._buffers,
        ).run()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._crowd.drain()
        if not self._crowd.wait(self._settings.server.drain_timeout):
            _log.warning("%d connections broken off", self._crowd.size)
            self._crowd.break_off()
            self._crowd.wait(1.0)

    def stop(self) -> None:
        """Drains: accepts no more, lets requests end, then writes what waits and closes the stores."""
        self.state.ready.clear()
        began = time.monotonic()
        self._undo.close()
        _log.info("stopped in %.1f s", time.monotonic() - began)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _open_stores(settings: Settings, undo: ExitStack) -> Mapping[str, TieredStore]:
    stores = {DEFAULT_TENANT: undo.enter_context(open_store(settings))}
    for name, tenant in settings.server.tenants.items():
        stores[name] = undo.enter_context(open_tiers(settings, tenant.tiers, name))
    return stores
