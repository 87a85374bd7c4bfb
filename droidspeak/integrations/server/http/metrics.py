"""The daemon's metrics: those of its own, and those of the tenants' stores.

Labels are bounded: tenants, tiers and reasons, never keys or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from droidspeak import __version__
from droidspeak.integrations.server.state import DaemonState
from droidspeak.storage import Counters
from droidspeak.telemetry.families import families
from droidspeak.telemetry.samples import Sample, StoreSamples
from droidspeak.telemetry.table import rows_of

__all__ = ["ROWS", "DaemonCollector", "registry_of"]

ROWS = rows_of("process", "server", "store")
"""What a daemon exports."""


def registry_of(daemon: DaemonState, http: Counters) -> CollectorRegistry:
    """A registry of its own, with the daemon's metrics. `http`: see `DaemonCollector`."""
    registry = CollectorRegistry()
    registry.register(DaemonCollector(daemon, http))
    return registry


class DaemonCollector(Collector):
    """Reads `daemon` whenever it is scraped.

    Args:
        http: counters of the HTTP side: `requests` by `"operation status"`, `refused` and `closed` by
            reason, `received_bytes`, `sent_bytes`, `connections` opened, and `ended`.
    """

    def __init__(self, daemon: DaemonState, http: Counters) -> None:
        self._daemon, self._http = daemon, http
        self._stores = StoreSamples()

    def describe(self) -> Iterable[Metric]:
        return families(ROWS, ())

    def collect(self) -> Iterable[Metric]:
        return families(ROWS, self._samples())

    def _samples(self) -> Iterator[Sample]:
        yield from self._server()
        yield from _side("lm", self._daemon.counters)
        yield from _side("http", self._http)
        for tenant, store in self._daemon.stores.items():
            yield from self._stores.of(tenant, store)

    def _server(self) -> Iterator[Sample]:
        daemon, http = self._daemon, self._http
        yield "build_info", (__version__,), 1
        yield "server_ready", (), daemon.ready.is_set()
        yield "server_connections", ("lm",), daemon.connections()
        yield "server_connections", ("http",), http.get("connections") - http.get("ended")
        yield "server_in_flight_bytes", (), daemon.budget.held
        yield "server_in_flight_capacity_bytes", (), daemon.settings.server.in_flight


def _side(side: str, counters: Counters) -> Iterator[Sample]:
    counts = counters.snapshot()
    for request, count in counts.get("requests", {}).items():
        command, _, status = request.partition(" ")
        yield "server_requests", (side, command, status), count
    for name in ("refused", "closed"):
        for reason, count in counts.get(name, {}).items():
            yield f"server_{name}", (side, reason), count
    for command, count in counts.get("failed", {}).items():
        yield "server_failed", (command,), count
    for name in ("received_bytes", "sent_bytes"):
        yield f"server_{name}", (side,), sum(counts.get(name, {}).values())
