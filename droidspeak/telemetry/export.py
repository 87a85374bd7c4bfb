"""Metrics of a process that serves a model.

    expose(droid.connector)                      on prometheus_client's registry, for an endpoint you have
    serve_metrics(droid.connector, port=9400)    on an endpoint of their own

Several connectors may be exposed in one process: what they count is added up, and a store that they share
counts once. A connector that is gone is no longer told of.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary, WeakSet

from droidspeak import __version__
from droidspeak.connector import Connector
from droidspeak.errors import ConfigError, MissingExtra
from droidspeak.telemetry.samples import Sample, StoreSamples, connector_samples
from droidspeak.telemetry.table import rows_of

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Metric, start_http_server
    from prometheus_client.registry import Collector
except ImportError:
    raise MissingExtra("metrics", "metrics") from None

from droidspeak.telemetry.families import families

__all__ = ["MetricsServer", "ProcessCollector", "expose", "serve_metrics"]

_ROWS = rows_of("process", "store", "requests", "drift")


class ProcessCollector(Collector):
    """Reads connectors and their stores whenever it is scraped."""

    def __init__(self) -> None:
        self._connectors: WeakSet[Connector] = WeakSet()
        self._stores = StoreSamples()

    def add(self, connector: Connector) -> None:
        """Tells of `connector` too, from now on."""
        self._connectors.add(connector)

    def describe(self) -> Iterable[Metric]:
        return families(_ROWS, ())

    def collect(self) -> Iterable[Metric]:
        return families(_ROWS, self._samples())

    def _samples(self) -> Iterator[Sample]:
        yield "build_info", (__version__,), 1
        connectors = list(self._connectors)
        for connector in connectors:
            yield from connector_samples(connector)
        for store in {id(connector.store): connector.store for connector in connectors}.values():
            yield from self._stores.of("", store)


_LOCK = threading.Lock()
_COLLECTORS: WeakKeyDictionary[CollectorRegistry, ProcessCollector] = WeakKeyDictionary()


def expose(connector: Connector, registry: CollectorRegistry = REGISTRY) -> None:
    """Puts the metrics of `connector` and of its store on `registry`. Doing it again changes nothing.

    Raises:
        MissingExtra: importing this module does, without prometheus_client.
    """
    with _LOCK:
        collector = _COLLECTORS.get(registry)
        if collector is None:
            collector = _COLLECTORS[registry] = ProcessCollector()
            registry.register(collector)
        collector.add(connector)


class MetricsServer:
    """An endpoint that Prometheus scrapes, until it is closed.

    Attributes:
        port: where it listens.
    """

    def __init__(self, port: int, stop: Callable[[], None]) -> None:
        self.port, self._stop = port, stop

    def close(self) -> None:
        """Ends it; `expose`d connectors stay so."""
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve_metrics(
    *connectors: Connector, port: int, host: str = "127.0.0.1", registry: CollectorRegistry = REGISTRY
) -> MetricsServer:
    """Exposes `connectors`, and serves `registry` over HTTP on a thread of its own.

    Args:
        port: 0 takes a free one.

    Raises:
        ConfigError: it cannot listen there.
    """
    for connector in connectors:
        expose(connector, registry)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(f"metrics cannot be served on {host}:{port}: {error.strerror}") from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return MetricsServer(server.server_port, stop)
