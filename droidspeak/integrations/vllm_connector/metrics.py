"""Our counters on vLLM's own `/metrics`.

    droidspeak_...                                 as in docs/metrics.md
    vllm:droidspeak_events_total{event, label}     counts of `droidspeak.connector.Connector.counters`

Counts travel from scheduler and workers to vLLM's logger as what has come since the last step. Gauges travel
as they are, each with the process that tells it: of one process the latest counts, and all are added up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from droidspeak import __version__
from droidspeak.integrations.vllm_connector.headers import OUTCOMES
from droidspeak.storage import Counters
from droidspeak.storage.counters import BOUNDS
from droidspeak.telemetry.samples import BUCKETS, counted
from droidspeak.telemetry.table import MetricRow, rows_of

__all__ = [
    "ConnectorMetrics",
    "ConnectorStats",
    "gauge_key",
    "gauges_of",
    "increase_key",
    "logged",
    "outcome_key",
]

_TOLD: WeakKeyDictionary[Counters, dict[str, int]] = WeakKeyDictionary()
_UNBOUNDED = ("shared_tokens",)  # labelled by source, which is told as a sum
# What the metrics of the table are made of; the events' own metric came before them and stays as it was.
_OF_THE_TABLE = ("lookups", "lookup_", "ttft", "hit_tokens", "layers", "load_", "wait_ns")
_EVENTS_TOO = ("lookup_failures",)

_ROWS = rows_of("process", "store", "requests")
_REGISTERED: list[Any] = []

_GAUGE, _INCREASE, _OUTCOME = "=", "+", "@"
_BETWEEN = "\x1f"  # what no tier is called


def gauge_key(name: str, process: str, labels: Iterable[str]) -> str:
    """What `ConnectorStats` call the value of a gauge of the table, as one process has it."""
    return _GAUGE + _BETWEEN.join((name, process, *labels))


def increase_key(name: str, labels: Iterable[str]) -> str:
    """What `ConnectorStats` call the increase of a counter of the table."""
    return _INCREASE + _BETWEEN.join((name, "", *labels))


def outcome_key(request_id: str) -> str:
    """What `ConnectorStats` call what became of a request, which is told once."""
    return _OUTCOME + request_id


@dataclass
class ConnectorStats(KVConnectorStats):  # type: ignore[misc]
    """Increases by `"event|label"` or `increase_key`, values by `gauge_key`, outcomes by `outcome_key`."""

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
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> ConnectorStats:
        """Both together; of a gauge that one process has told twice, the value that `other` has."""
        data = {**self.data, **other.data}
        for name in self.data.keys() & other.data.keys():
            if not name.startswith(_GAUGE):
                data[name] = self.data[name] + other.data[name]
        return ConnectorStats(data=data)

    def reduce(self) -> dict[str, int | float]:
        return {name.replace("|", " "): count for name, count in logged(self.data).data.items()}

    def is_empty(self) -> bool:
        return not self.data


def gauges_of(stats: ConnectorStats) -> dict[str, float]:
    """The gauges among `stats`, by their keys."""
    return {name: value for name, value in stats.data.items() if name.startswith(_GAUGE)}


def logged(data: dict[str, float]) -> ConnectorStats:
    """What of `data` vLLM logs: events. Without any, it logs no line."""
    return ConnectorStats(data={name: count for name, count in data.items() if _is_event(name)})


def _flat(counters: Counters) -> dict[str, int]:
    flat: dict[str, int] = {}
    for event, labels in counters.snapshot().items():
        for label, count in labels.items():
            name = f"{event}|{'' if event in _UNBOUNDED else label}"
            flat[name] = flat.get(name, 0) + count
    return flat


def _is_event(name: str) -> bool:
    event = name.partition("|")[0]
    return event in _EVENTS_TOO or not event.startswith((*_OF_THE_TABLE, _GAUGE, _INCREASE, _OUTCOME))


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
        self._gauges: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
        for engine in per_engine_labelvalues.values():
            self._metrics["build_info"].labels(*engine, __version__).set(1)

    def _metric(self, row: MetricRow, labelnames: list[str]) -> Any:
        named = {"name": row.family, "documentation": row.help, "labelnames": [*labelnames, *row.labels]}
        if row.kind == "counter":
            return self._counter_cls(**named)
        if row.kind == "gauge":
            # Of several API servers, the one that was told last knows: vLLM's own gauges are such.
            return self._gauge_cls(**named, multiprocess_mode="mostrecent")
        return self._histogram_cls(**named, buckets=list(BOUNDS))

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        counts: dict[str, dict[str, int]] = defaultdict(dict)
        for name, count in transfer_stats_data.items():
            if name.startswith(_OUTCOME):
                OUTCOMES.put(name.removeprefix(_OUTCOME), count)
                continue
            if name.startswith((_GAUGE, _INCREASE)):
                self._sampled(engine, name, count)
                continue
            event, _, label = name.partition("|")
            counts[event][label] = count
            if _is_event(name):
                self._events.labels(*engine, event, label).inc(count)
        self._counted(engine, counts)

    def _sampled(self, engine: list[Any], key: str, value: float) -> None:
        name, process, *labels = key[1:].split(_BETWEEN)
        metric = self._metrics[name].labels(*engine, *labels)
        if key.startswith(_INCREASE):
            metric.inc(value)
            return
        values = self._gauges[(*engine, name, *labels)]
        values[process] = value
        metric.set(sum(values.values()))

    def _counted(self, engine: list[Any], counts: dict[str, dict[str, int]]) -> None:
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
