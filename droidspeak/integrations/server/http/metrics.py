"""The metrics: one table, read by the collector, the documentation and its test.

All begin with `droidspeak_`. Labels are bounded: tenants, tiers and reasons, never keys or models.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from droidspeak import __version__
from droidspeak.errors import StorageError
from droidspeak.integrations.server.state import DaemonState
from droidspeak.storage import Counters, Tier, TierUsage

__all__ = ["METRICS", "DaemonCollector", "MetricRow", "metrics_table", "registry_of"]

Sample = tuple[str, tuple[str, ...], float]

# A tier whose usage took n seconds to find out is asked again after this many times n.
_REST = 100


@dataclass(frozen=True)
class MetricRow:
    """One metric.

    Attributes:
        name: without the prefix, and of a counter without `_total`.
        kind: `counter` or `gauge`.
        unit: of the value; empty for a plain number.
    """

    name: str
    kind: str
    unit: str
    labels: tuple[str, ...]
    help: str

    @property
    def full_name(self) -> str:
        """As it is scraped."""
        return f"droidspeak_{self.name}" + ("_total" if self.kind == "counter" else "")

    def family(self) -> CounterMetricFamily | GaugeMetricFamily:
        """An empty family of it."""
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        return kind(f"droidspeak_{self.name}", self.help, labels=self.labels)


METRICS = (
    MetricRow("build_info", "gauge", "", ("version",), "Always 1."),
    MetricRow("server_ready", "gauge", "", (), "1 while requests are served, 0 while it starts or drains."),
    MetricRow(
        "server_requests",
        "counter",
        "",
        ("side", "command", "status"),
        "Requests: lm by command (no status), http by operation and status code.",
    ),
    MetricRow(
        "server_refused", "counter", "", ("side", "reason"), "Requests not answered with what they asked for."
    ),
    MetricRow("server_failed", "counter", "", ("command",), "lm requests that the store failed to serve."),
    MetricRow("server_connections", "gauge", "", ("side",), "Open connections."),
    MetricRow("server_closed", "counter", "", ("side", "reason"), "Connections that ended, by who or what."),
    MetricRow("server_received_bytes", "counter", "bytes", ("side",), "Bytes of payloads received."),
    MetricRow("server_sent_bytes", "counter", "bytes", ("side",), "Bytes of answers sent."),
    MetricRow("server_in_flight_bytes", "gauge", "bytes", (), "Payloads being received or sent, both sides."),
    MetricRow("server_in_flight_capacity_bytes", "gauge", "bytes", (), "The most of it."),
    MetricRow("tier_up", "gauge", "", ("tenant", "tier"), "1 if the tier answers, 0 if not."),
    MetricRow("tier_bytes", "gauge", "bytes", ("tenant", "tier"), "Bytes held."),
    MetricRow(
        "tier_capacity_bytes", "gauge", "bytes", ("tenant", "tier"), "The most of it; absent without a bound."
    ),
    MetricRow("tier_chunks", "gauge", "", ("tenant", "tier"), "Chunks held."),
    MetricRow(
        "store_events",
        "counter",
        "",
        ("tenant", "tier", "event"),
        "Hits, misses, corruptions and so on; tier is empty for what is of no tier.",
    ),
)


def metrics_table() -> str:
    """The table as Markdown."""
    lines = ["| metric | type | unit | labels | meaning |", "|---|---|---|---|---|"]
    for row in METRICS:
        labels = ", ".join(f"`{label}`" for label in row.labels)
        lines.append(f"| `{row.full_name}` | {row.kind} | {row.unit} | {labels} | {row.help} |")
    return "\n".join(lines)


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
        self._usages: dict[tuple[str, str], _Usage] = {}

    def describe(self) -> Iterable[Metric]:
        return [row.family() for row in METRICS]

    def collect(self) -> Iterable[Metric]:
        families = {row.name: row.family() for row in METRICS}
        for name, labels, value in self._samples():
            families[name].add_metric(labels, value)
        return families.values()

    def _samples(self) -> Iterator[Sample]:
        yield from self._server()
        yield from _side("lm", self._daemon.counters)
        yield from _side("http", self._http)
        for tenant, store in self._daemon.stores.items():
            for tier in store.tiers:
                yield from self._tier(tenant, tier)
            for event, by_tier in store.counters.snapshot().items():
                for tier_name, count in by_tier.items():
                    yield "store_events", (tenant, tier_name, event), count

    def _server(self) -> Iterator[Sample]:
        daemon, http = self._daemon, self._http
        yield "build_info", (__version__,), 1
        yield "server_ready", (), daemon.ready.is_set()
        yield "server_connections", ("lm",), daemon.connections()
        yield "server_connections", ("http",), http.get("connections") - http.get("ended")
        yield "server_in_flight_bytes", (), daemon.budget.held
        yield "server_in_flight_capacity_bytes", (), daemon.settings.server.in_flight

    def _tier(self, tenant: str, tier: Tier) -> Iterator[Sample]:
        usage = self._usages.setdefault((tenant, tier.name), _Usage(tier)).get()
        where = (tenant, tier.name)
        yield "tier_up", where, usage is not None
        if usage:
            yield "tier_bytes", where, usage.nbytes
            yield "tier_chunks", where, usage.chunks
            if usage.capacity is not None:
                yield "tier_capacity_bytes", where, usage.capacity


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


class _Usage:
    """A tier's usage, not asked for more often than it is cheap: S3 lists a whole bucket for it."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._due = 0.0
        self._last: TierUsage | None = None

    def get(self) -> TierUsage | None:
        """The usage, or `None` of a tier that does not answer."""
        began = time.monotonic()
        if began >= self._due:
            try:
                self._last = self._tier.usage()
            except StorageError:
                self._last = None
            now = time.monotonic()
            self._due = now + _REST * (now - began)
        return self._last
