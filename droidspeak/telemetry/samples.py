"""Where the metrics' values are: in a store's counters and tiers, and in a connector's counters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate

from droidspeak.connector import Connector, Reason
from droidspeak.layerselect.drift import DriftState
from droidspeak.storage import Tier, TieredStore, TierUsage
from droidspeak.storage.breaker import BreakerState
from droidspeak.storage.counters import BOUNDS
from droidspeak.storage.guard import GuardedTier
from droidspeak.telemetry.rested import Rested

__all__ = [
    "BUCKETS",
    "Counts",
    "Sample",
    "StoreSamples",
    "connector_samples",
    "counted",
    "cumulative",
    "drift_samples",
    "event_samples",
    "evicted_samples",
    "queue_samples",
]

Sample = tuple[str, tuple[str, ...], float]
"""Name of a row, values of its labels, value. Of a histogram `NAME_bucket` (not yet summed up; last label
the upper bound) and `NAME_sum`."""

Counts = Mapping[str, Mapping[str, int]]
"""As of `Counters.snapshot`."""

BUCKETS = (*map(str, BOUNDS), "+Inf")

# Of a connector's counters: their name, the metric, and what a label says of the metric's labels.
_PLAIN: dict[str, tuple[str, Callable[[str], tuple[str, ...]]]] = {
    "lookups": ("lookups", lambda label: (label,)),
    "lookup_failures": ("lookup_failures", lambda _label: ()),
    "reasons": ("requests", lambda label: (Reason(label).status.value, label)),
    "hit_tokens": ("hit_tokens", lambda label: tuple(label.split(" "))),
    "layers": ("plan_layers", lambda label: (label,)),
    "load_bytes": ("load_bytes", lambda label: (label,)),
    "bytes_loaded": ("stored_bytes_loaded", lambda _label: ()),
    "chunks_saved": ("save_chunks", lambda _label: ("saved",)),
    "save_failures": ("save_chunks", lambda _label: ("failed",)),
    "chunks_dropped": ("save_chunks", lambda _label: ("dropped",)),
    "chunks_abandoned": ("save_chunks", lambda _label: ("abandoned",)),
}
_NANOSECONDS: dict[str, tuple[str, Callable[[str], tuple[str, ...]]]] = {
    "load_ns": ("load_seconds", lambda label: (label,)),
    "wait_ns": ("load_wait_seconds", lambda _label: ()),
}
_DURATIONS: dict[str, tuple[str, Callable[[str], tuple[str, ...]]]] = {
    "lookup": ("lookup_seconds", lambda _label: ()),
    "ttft_predicted": ("ttft_predicted_seconds", lambda _label: ()),
    "ttft": ("ttft_seconds", lambda label: (label,)),
}


def counted(counts: Counts) -> Iterator[Sample]:
    """Counters and histograms in what a connector has counted, or has counted since some time."""
    for name, by_label in counts.items():
        for label, count in by_label.items():
            yield from _counted(name, label, count)


def _counted(name: str, label: str, count: int) -> Iterator[Sample]:
    if name in _PLAIN:
        metric, labels = _PLAIN[name]
        yield metric, labels(label), count
    elif name in _NANOSECONDS:
        metric, labels = _NANOSECONDS[name]
        yield metric, labels(label), count / 1e9
    elif (duration := name.removesuffix("_bucket")) in _DURATIONS:
        metric, labels = _DURATIONS[duration]
        of, _, bound = label.rpartition(" ")
        yield f"{metric}_bucket", (*labels(of), bound), count
    elif (duration := name.removesuffix("_ns")) in _DURATIONS:
        metric, labels = _DURATIONS[duration]
        yield f"{metric}_sum", labels(label), count / 1e9


def cumulative(counts: Mapping[str, float]) -> list[tuple[str, float]]:
    """Buckets of a histogram as Prometheus has them: each with all that is below it."""
    return list(zip(BUCKETS, accumulate(counts.get(bound, 0) for bound in BUCKETS), strict=True))


def connector_samples(connector: Connector) -> Iterator[Sample]:
    """Requests of one connector, and drift of its pairs."""
    yield from counted(connector.counters.snapshot())
    yield "save_queue_bytes", (), connector.saving
    yield "save_queue_capacity_bytes", (), connector.options.save_backlog
    if connector.guard is not None:
        yield from drift_samples(connector.guard.states())


def drift_samples(states: Iterable[DriftState]) -> Iterator[Sample]:
    """Pairs as the drift guard sees them."""
    for state in states:
        pair = state.sender[:12], state.receiver[:12]
        yield "drift_out_of_service", pair, state.drifted
        yield "drift_samples", pair, state.observed
        if state.agreement is not None and state.kl is not None:
            yield "drift_agreement_ratio", pair, state.agreement
            yield "drift_kl_nats", pair, state.kl


def queue_samples(tenant: str, store: TieredStore) -> Iterator[Sample]:
    """What waits in a store."""
    for name, queue in store.queues().items():
        yield "write_queue_bytes", (tenant, name), queue.nbytes
        yield "write_queue_capacity_bytes", (tenant, name), queue.capacity
    yield "promote_queue_bytes", (tenant,), store.promoting


def event_samples(tenant: str, store: TieredStore) -> Iterator[Sample]:
    """What a store has counted."""
    for event, by_tier in store.counters.snapshot().items():
        for name, count in by_tier.items():
            yield "store_events", (tenant, name, event), count


def evicted_samples(tenant: str, tier: Tier) -> Iterator[Sample]:
    """What this process has thrown out of a tier."""
    evicted = tier.evicted()
    yield "tier_evicted_chunks", (tenant, tier.name), evicted.chunks
    yield "tier_evicted_bytes", (tenant, tier.name), evicted.nbytes


class StoreSamples:
    """Tiers of stores. Remembers what it was dear to ask."""

    def __init__(self) -> None:
        self._usages: dict[tuple[str, str], Rested[TierUsage]] = {}

    def of(self, tenant: str, store: Tier) -> Iterator[Sample]:
        """Samples of one store, which may be a single tier."""
        if not isinstance(store, TieredStore):
            yield from self._tier(tenant, store)
            return
        for tier in store.tiers:
            yield from self._tier(tenant, tier)
        yield from queue_samples(tenant, store)
        yield from event_samples(tenant, store)

    def _tier(self, tenant: str, tier: Tier) -> Iterator[Sample]:
        where = (tenant, tier.name)
        usage = self._usages.setdefault(where, Rested()).get(tier.usage)
        yield "tier_up", where, usage is not None
        if usage:
            yield "tier_bytes", where, usage.nbytes
            yield "tier_chunks", where, usage.chunks
            if usage.capacity is not None:
                yield "tier_capacity_bytes", where, usage.capacity
        yield from evicted_samples(tenant, tier)
        if isinstance(tier, GuardedTier):
            for side, state in (("reading", tier.reading), ("writing", tier.writing)):
                yield "tier_skipped", (*where, side), state is not BreakerState.CLOSED
