"""Our counters on vLLM's own `/metrics`.

    droidspeak_...                                 counters and histograms of docs/metrics.md
    vllm:droidspeak_events_total{event, label}     counts of `droidspeak.connector.Connector.counters`

Counts travel from scheduler and workers to vLLM's logger as what has come since the last step.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from droidspeak.storage import Counters
from droidspeak.storage.counters import BOUNDS
from droidspeak.telemetry.samples import BUCKETS, counted
from droidspeak.telemetry.table import MetricRow, rows_of

__all__ = ["ConnectorMetrics", "ConnectorStats"]

_TOLD: WeakKeyDictionary[Counters, dict[str, int]] = WeakKeyDictionary()
_UNBOUNDED = ("shared_tokens",)  # labelled by source, which is told as a sum
# What the metrics of the table are made of; the events' own metric came before them and stays as it was.
_OF_THE_TABLE = ("lookups", "lookup_", "ttft", "hit_tokens", "layers", "load_", "wait_ns")
_EVENTS_TOO = ("lookup_failures",)

_ROWS = [row for row in rows_of("requests") if row.kind != "gauge"]
_REGISTERED: list[Any] = []


@dataclass
class ConnectorStats(KVConnectorStats):  # type: ignore[misc]
    """Increases by `"event|label"`."""

    @classmethod
    def since_last(cls, counters: Counters) -> ConnectorStats | None:
        """What `counters` have counted since the last call; `None` if nothing."""
        now = _flat(counters)
        before = _TOLD.get(counters, {})
        _TOLD[counters] = now
        increases = {name: count - before.get(name, 0) for name, count in now.items()}
        data = {name: count for name, count in increases.items() if count}
        return cls(data=data) if data else None

    def reset(self) -> None:
        self.data: dict[str, int] = {}

    def aggregate(self, other: KVConnectorStats) -> ConnectorStats:
        names = self.data.keys() | other.data.keys()
        return ConnectorStats(
            data={name: self.data.get(name, 0) + other.data.get(name, 0) for name in sorted(names)}
        )

    def reduce(self) -> dict[str, int | float]:
        return {name.replace("|", " "): count for name, count in self.data.items() if _is_event(name)}

    def is_empty(self) -> bool:
        return not self.data


def _flat(counters: Counters) -> dict[str, int]:
    flat: dict[str, int] = {}
    for event, labels in counters.snapshot().items():
        for label, count in labels.items():
            name = f"{event}|{'' if event in _UNBOUNDED else label}"
            flat[name] = flat.get(name, 0) + count
    return flat


def _is_event(name: str) -> bool:
    event = name.partition("|")[0]
    return event in _EVENTS_TOO or not event.startswith(_OF_THE_TABLE)


class ConnectorMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Prometheus metrics of one API server."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._events = self._counter_cls(
            name="vllm:droidspeak_events",
            documentation="What the DroidSpeak connector has counted: requests by status, reasons, chunks.",
            labelnames=[*labelnames, "event", "label"],
        )
        _unregister()
        self._metrics = {row.name: self._metric(row, labelnames) for row in _ROWS}
        _REGISTERED.extend(self._metrics.values())

    def _metric(self, row: MetricRow, labelnames: list[str]) -> Any:
        names = [*labelnames, *row.labels]
        if row.kind == "counter":
            return self._counter_cls(name=row.family, documentation=row.help, labelnames=names)
        return self._histogram_cls(
            name=row.family, documentation=row.help, labelnames=names, buckets=list(BOUNDS)
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        counts: dict[str, dict[str, int]] = defaultdict(dict)
        for name, count in transfer_stats_data.items():
            event, _, label = name.partition("|")
            counts[event][label] = count
            if _is_event(name):
                self._events.labels(*engine, event, label).inc(count)
        durations: dict[tuple[str, tuple[str, ...]], _Durations] = defaultdict(_Durations)
        for name, labels, value in counted(counts):
            if name in self._metrics:
                self._metrics[name].labels(*engine, *labels).inc(value)
            elif name.endswith("_bucket"):
                durations[name.removesuffix("_bucket"), labels[:-1]].counts[labels[-1]] = int(value)
            else:
                durations[name.removesuffix("_sum"), labels].total = value
        for (name, labels), found in durations.items():
            metric = self._metrics[name].labels(*engine, *labels)
            for seconds in found.seconds():
                metric.observe(seconds)


class _Durations:
    """Durations of one step, of which buckets and sum are known."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.total = 0.0

    def seconds(self) -> list[float]:
        """One of each, in its bucket; if there is only one, or they are alike, exactly as it was."""
        mean = self.total / max(1, sum(self.counts.values()))
        found: list[float] = []
        for low, high, bound in zip((0.0, *BOUNDS), (*BOUNDS, float("inf")), BUCKETS, strict=True):
            inside = min(max(mean, low + 1e-9), high)
            found += [inside] * self.counts.get(bound, 0)
        return found


def _unregister() -> None:
    """Takes what an earlier engine of this process has registered out: vLLM does so with names of its own."""
    while _REGISTERED:
        with suppress(KeyError, AttributeError):  # not there any more, or not of prometheus_client
            REGISTRY.unregister(_REGISTERED.pop())
