"""From samples to what prometheus_client exports."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import TypeAlias

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from droidspeak.telemetry.samples import Sample, cumulative
from droidspeak.telemetry.table import MetricRow

__all__ = ["families"]

Family: TypeAlias = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

# Of several connectors and stores in one process, what one number can say: all of it, unless here.
_JOINED: dict[str, Callable[[float, float], float]] = {
    "build_info": max,
    "tier_up": min,
    "tier_skipped": max,
    "drift_out_of_service": max,
    "drift_agreement_ratio": min,
    "drift_kl_nats": max,
}


def families(rows: Collection[MetricRow], samples: Iterable[Sample]) -> Iterable[Metric]:
    """A family for each of `rows`, those without samples too. Samples of one name and labels are joined."""
    values: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for name, labels, value in samples:
        known = values[name]
        join = _JOINED.get(name, float.__add__)
        known[labels] = join(known[labels], float(value)) if labels in known else float(value)
    return [_family(row, values) for row in rows]


def _family(row: MetricRow, values: dict[str, dict[tuple[str, ...], float]]) -> Metric:
    if row.kind == "histogram":
        return _histogram(row, values[f"{row.name}_bucket"], values[f"{row.name}_sum"])
    kind = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
    family = kind(row.family, row.help, labels=row.labels)
    for labels, value in values[row.name].items():
        family.add_metric(labels, value)
    return family


def _histogram(
    row: MetricRow, counts: dict[tuple[str, ...], float], sums: dict[tuple[str, ...], float]
) -> Metric:
    family = HistogramMetricFamily(row.family, row.help, labels=row.labels)
    buckets: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for (*labels, bound), count in counts.items():
        buckets[tuple(labels)][bound] = count
    for of, by_bound in buckets.items():
        family.add_metric(of, cumulative(by_bound), sums.get(of, 0.0))
    return family
