"""Our counters on vLLM's own `/metrics`.

    vllm:droidspeak_events_total{event, label}     counts of `droidspeak.connector.Connector.counters`

Counts travel from scheduler and workers to vLLM's logger as what has come since the last step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from droidspeak.storage import Counters

__all__ = ["ConnectorMetrics", "ConnectorStats"]

_TOLD: WeakKeyDictionary[Counters, dict[str, int]] = WeakKeyDictionary()
_UNBOUNDED = ("shared_tokens",)  # labelled by source, which is told as a sum


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
        return {name.replace("|", " "): count for name, count in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


def _flat(counters: Counters) -> dict[str, int]:
    flat: dict[str, int] = {}
    for event, labels in counters.snapshot().items():
        for label, count in labels.items():
            name = f"{event}|{'' if event in _UNBOUNDED else label}"
            flat[name] = flat.get(name, 0) + count
    return flat


class ConnectorMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Prometheus counters of one API server."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._events = self._counter_cls(
            name="vllm:droidspeak_events",
            documentation="What the DroidSpeak connector has counted: requests by status, reasons, chunks.",
            labelnames=[*labelnames, "event", "label"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, count in transfer_stats_data.items():
            event, _, label = name.partition("|")
            self._events.labels(*self.per_engine_labelvalues[engine_idx], event, label).inc(count)
