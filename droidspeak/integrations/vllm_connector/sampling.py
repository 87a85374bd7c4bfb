"""Tiers and queues of an engine, for its `/metrics`.

What a tier holds may take long to find out (S3 lists a bucket, a daemon may be down), so it is asked on a
thread of its own, while the engine steps, and a step only hands on what was found last.

    scheduler    whether tiers answer, and what they hold: they are the same ones for all workers
    workers      memory and queues, which each has for itself, and which add up
    all          evictions and a store's events, as increases
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

from droidspeak.connector import Connector
from droidspeak.integrations.vllm_connector.metrics import ConnectorStats, gauge_key, gauges_of, increase_key
from droidspeak.storage import TieredStore
from droidspeak.storage.tier import TierQueue
from droidspeak.telemetry.samples import (
    Sample,
    StoreSamples,
    event_samples,
    evicted_samples,
    queue_samples,
)

__all__ = ["EngineSamples", "Sampler", "StepStats"]

_log = logging.getLogger(__name__)

_PAUSE = 5.0  # seconds between two samples; docs/metrics.md and docs/vllm.md say so
_PATIENCE = 5.0  # seconds that the end waits for a tier that is being asked
_STATE = ("tier_up", "tier_skipped")
_USAGE = ("tier_bytes", "tier_chunks", "tier_capacity_bytes")

# Counts of stores that have been told; in an engine of one process, scheduler and worker share a store.
_TOLD: WeakKeyDictionary[TieredStore, dict[str, float]] = WeakKeyDictionary()
_TELLING = threading.Lock()


class EngineSamples:
    """Samples one process of an engine.

    Args:
        who: names a worker among those of its engine; empty for the scheduler.
        saving: what waits to be saved; `None` where nothing is.
    """

    def __init__(self, store: TieredStore, who: str, saving: Callable[[], TierQueue | None]) -> None:
        self._store, self._who, self._saving = store, who, saving
        self._usages = StoreSamples()

    def take(self) -> ConnectorStats:
        """A sample; increases are those since the last one that anyone took of the store."""
        gauges = self._of_worker() if self._who else self._of_scheduler()
        data = {gauge_key(name, self._who, labels): float(value) for name, labels, value in gauges}
        with _TELLING:
            data.update(self._increases())
        return ConnectorStats(data=data)

    def _of_scheduler(self) -> Iterator[Sample]:
        for tier in self._store.tiers:
            names = _STATE if tier.in_memory else (*_STATE, *_USAGE)
            yield from (sample for sample in self._usages.of("", tier) if sample[0] in names)

    def _of_worker(self) -> Iterator[Sample]:
        for tier in self._store.tiers:
            if tier.in_memory:
                yield from (sample for sample in self._usages.of("", tier) if sample[0] in _USAGE)
        yield from queue_samples("", self._store)
        if (saving := self._saving()) is not None:
            yield "save_queue_bytes", (), saving.nbytes
            yield "save_queue_capacity_bytes", (), saving.capacity

    def _counts(self) -> Iterator[Sample]:
        for tier in self._store.tiers:
            yield from evicted_samples("", tier)
        yield from event_samples("", self._store)

    def _increases(self) -> dict[str, float]:
        counts = {increase_key(name, labels): count for name, labels, count in self._counts()}
        told = _TOLD.get(self._store, {})
        _TOLD[self._store] = counts
        # A first count of 0 is told too: `increase` sees only what comes after a first value.
        return {
            key: count - told.get(key, 0)
            for key, count in counts.items()
            if key not in told or count > told[key]
        }


class Sampler:
    """Takes samples beside the engine's steps; none while the engine idles.

    Args:
        pause: seconds between two.
    """

    def __init__(self, take: Callable[[], ConnectorStats], pause: float = _PAUSE) -> None:
        self._take, self._pause = take, pause
        self._lock = threading.Lock()
        self._found: ConnectorStats | None = None
        self._wanted, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def latest(self) -> ConnectorStats | None:
        """What was found since the last call, if anything; wants another. Never waits for a tier."""
        if not self._wanted.is_set():
            self._wanted.set()
            self._start()
        if self._found is None:
            return None
        with self._lock:
            found, self._found = self._found, None
        return found

    def close(self) -> None:
        """Ends the thread; one that a tier holds is left behind after a while, and ends when that does."""
        self._ended.set()
        self._wanted.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="droidspeak-sample", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while self._wanted.wait() and not self._ended.is_set():
            self._wanted.clear()
            try:
                self._keep(self._take())
            except BaseException:  # noqa: BLE001 - metrics never harm an engine, whatever a tier of the user raises
                _log.exception("tiers and queues not sampled")
            self._ended.wait(self._pause)

    def _keep(self, sample: ConnectorStats) -> None:
        with self._lock:
            self._found = sample if self._found is None else self._found.aggregate(sample)


class StepStats:
    """What one connector tells vLLM's logger with each step: what it has counted, and the latest sample.

    With a sample the scheduler tells all that it knows of its workers too: of several API servers, vLLM tells
    each step to one.
    """

    def __init__(self, connector: Connector, sampler: Sampler) -> None:
        self._counters, self._sampler = connector.counters, sampler
        self._gauges: dict[str, float] = {}
        self._news = False

    def hear(self, stats: object) -> None:
        """Takes note of what workers tell."""
        if isinstance(stats, ConnectorStats):
            self._note(stats)

    def next(self) -> ConnectorStats | None:
        """What is new; `None` if nothing."""
        counted, sample = ConnectorStats.since_last(self._counters), self._sampler.latest()
        if sample is not None:
            self._note(sample)
            counted = sample if counted is None else counted.aggregate(sample)
        if self._news:
            self._news = False
            known = ConnectorStats(data=dict(self._gauges))
            counted = known if counted is None else counted.aggregate(known)
        return counted

    def close(self) -> None:
        """Ends the sampling."""
        self._sampler.close()

    def _note(self, stats: ConnectorStats) -> None:
        if gauges := gauges_of(stats):
            self._gauges.update(gauges)
            self._news = True
