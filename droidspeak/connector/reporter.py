"""What one process tells of itself: figures by pair, and a report that is kept beside the store.

While there are requests, one thread hands the report over every few seconds, and `close` does so once more. A
request only adds to the figures. What cannot be kept is counted (`report_failures`) and comes with the next.
Once the store is closed no more are handed over.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from weakref import WeakKeyDictionary

from droidspeak.connector.layout import RowLayout
from droidspeak.connector.match import Match
from droidspeak.connector.reports import (
    MOST_DRIFT,
    NEW_AFTER,
    Drift,
    Report,
    Sums,
    encoded,
    fold_reports,
)
from droidspeak.connector.shards import Shard
from droidspeak.connector.status import Outcome
from droidspeak.errors import StorageError, TierClosed
from droidspeak.layerselect.drift import DriftGuard
from droidspeak.storage import ChunkInfo, Counters, Tier, TieredStore

__all__ = ["Reporter", "shares_of"]

_log = logging.getLogger(__name__)

# What the counters hold besides is for this process's own metrics.
_COUNTED = (
    "requests",
    "reasons",
    "lookups",
    "lookup_failures",
    "chunks_saved",
    "chunks_dropped",
    "chunks_abandoned",
    "save_failures",
)
_REMEMBERED_CHUNKS = 1 << 16
_CLOSE_SECONDS = 10.0

_OWNERS: WeakKeyDictionary[TieredStore, str] = WeakKeyDictionary()
"""Who reports what a store has counted, where connectors of one process share it."""


class Reporter:
    """The figures of one connector, and its report.

    Args:
        engine: for people: which door it is.
        interval: seconds between reports; 0 for none at all.
        counters: of the connector: some of them are reported, and failures are counted there.
    """

    def __init__(
        self,
        store: Tier,
        engine: str,
        interval: float,
        counters: Counters,
        guard: DriftGuard | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store, self._engine, self._interval = store, engine, interval
        self._counters, self._guard, self._now = counters, guard, now
        self._lock = threading.Lock()
        self._sums = Sums()
        self._seen = _Seen(_REMEMBERED_CHUNKS)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._new_figures = self._folded = False
        self._kept = True
        self._id = uuid.uuid4().hex
        self._started = self._told = now()
        self._before, self._last = Sums(), Sums()
        if isinstance(store, TieredStore):
            _OWNERS.setdefault(store, self._id)
        self._owner = isinstance(store, TieredStore) and _OWNERS[store] == self._id

    def record(self, outcome: Outcome, match: Match | None) -> None:
        """Counts the answer to a request that `match` was found for."""
        shares = shares_of(outcome, match, self._seen.first) if match is not None else Sums()
        with self._lock:
            self._sums.add(shares)
        self.wake()

    def wake(self) -> None:
        """There is something new to tell."""
        with self._lock:
            self._new_figures = True
            if self._interval and self._kept and not (self._thread or self._closing.is_set()):
                self._thread = threading.Thread(target=self._work, name="droidspeak-report", daemon=True)
                self._thread.start()

    def report(self, *, ended: bool = False) -> Report:
        """The report as it is now."""
        return Report.of(
            self._figures().since(self._before),
            id=self._id,
            engine=self._engine,
            host=socket.gethostname()[:200],
            pid=os.getpid(),
            started=self._started,
            updated=self._now(),
            ended=ended,
            drift=list(_drift(self._guard)),
        )

    def close(self) -> None:
        """Hands over the last report, if there is anything to tell; waits for that, but not for ever."""
        if self._closing.is_set():
            return
        self._closing.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(_CLOSE_SECONDS)
        if self._interval and self._kept and (self._new_figures or self._last):
            last = threading.Thread(target=self._hand_over, kwargs={"ended": True}, daemon=True)
            last.start()
            last.join(_CLOSE_SECONDS)

    def _work(self) -> None:
        while not self._closing.wait(self._interval):
            with self._lock:
                self._new_figures = False
            self._hand_over()
            with self._lock:
                if not (self._new_figures and self._kept):
                    self._thread = None
                    return

    def _hand_over(self, *, ended: bool = False) -> None:
        try:
            self._keep(ended)
        except TierClosed as error:
            # Whoever closed the store before its connector waits for no report.
            self._kept = False
            self._counters.add("report_failures")
            _log.debug("no more reports: %s", error)
        except StorageError as error:
            self._counters.add("report_failures")
            _log.debug("report not kept: %s", error)
        except Exception:  # noqa: BLE001 - it must not end the process that serves, whatever a tier raises
            self._counters.add("report_failures")
            _log.exception("report not kept")

    def _keep(self, ended: bool) -> None:
        if self._last and self._now() - self._told > NEW_AFTER:
            # The old document may have been folded meanwhile: what it told must not be told again.
            self._id, self._started, self._before = uuid.uuid4().hex, self._told, self._last
        report, figures = self.report(ended=ended), self._figures()
        self._kept = self._store.put_report(self._id, encoded(report))
        self._told, self._last = report.updated, figures
        if self._kept and not self._folded:
            self._folded = True
            self._store.fold_reports(fold_reports)

    def _figures(self) -> Sums:
        """Everything since this connector was made."""
        with self._lock:
            figures = Sums(self._sums)
        table = self._counters.snapshot()
        figures.add(_labelled("count", table, _COUNTED))
        for tier, nbytes in table.get("load_bytes", {}).items():
            seconds = table.get("load_ns", {}).get(tier, 0) / 1e9
            figures.add({("tier", tier, "bytes"): nbytes, ("tier", tier, "seconds"): seconds})
        if self._owner and isinstance(self._store, TieredStore):
            figures.add(_events(self._store))
        return figures


def shares_of(outcome: Outcome, match: Match, first: Callable[[str, ChunkInfo], bool]) -> Sums:
    """What a request got from whose caches.

    Stored bytes that came for both are divided as the plan divides them.

    Args:
        first: whether this receiver uses a chunk for the first time.
    """
    shares, receiver = Sums(), match.receiver
    if receiver is None or not (outcome.exact_tokens or outcome.shared_tokens):
        return shares
    own, me = _own_share(outcome, match), receiver.source_id
    if outcome.exact_tokens:
        shares.add(
            _figures_of(me, me, outcome.exact_tokens, outcome.exact_tokens, own * outcome.bytes_loaded)
        )
    if outcome.shared_tokens and outcome.plan and outcome.source:
        plan = outcome.plan
        saved = outcome.shared_tokens * len(plan.loaded) / plan.layers
        loaded = (1 - own) * outcome.bytes_loaded
        shares.add(_figures_of(outcome.source, me, outcome.shared_tokens, saved, loaded))
        unstored = sum(_whole(info) for info in match.shared if first(me, info))
        shares.add({("pair", outcome.source, me, "bytes_unstored"): unstored})
    return shares


def _figures_of(sender: str, receiver: str, tokens: int, saved: float, loaded: float) -> Sums:
    figures = {"requests": 1, "tokens": tokens, "tokens_saved": saved, "bytes_loaded": round(loaded)}
    return Sums({("pair", sender, receiver, name): value for name, value in figures.items()})


def _own_share(outcome: Outcome, match: Match) -> float:
    """Of the bytes of both, those of the receiver's own chunks."""
    if not (outcome.shared_tokens and outcome.plan and match.receiver):
        return 1.0
    if not outcome.exact_tokens:
        return 0.0
    layout, plan = RowLayout.of(match.receiver.architecture, 1), outcome.plan
    own = outcome.exact_tokens * plan.layers * layout.kv_bytes
    row = len(plan.loaded) * layout.kv_bytes + len(plan.transition_layers) * layout.e_bytes
    both = own + outcome.shared_tokens * row
    return own / both if both else 0.0  # a plan that recomputes all loads nothing


def _whole(info: ChunkInfo) -> int:
    """Bytes of all shards of a chunk; the first one was looked up for all."""
    return info.nbytes * Shard.parse(info.key.shard).size


def _labelled(kind: str, table: dict[str, dict[str, int]], names: Iterable[str]) -> Sums:
    return Sums(
        {(kind, name, label): count for name in names for label, count in table.get(name, {}).items()}
    )


def _events(store: TieredStore) -> Sums:
    table = store.counters.snapshot()
    events = _labelled("event", table, table)
    for tier in store.tiers:
        evicted = tier.evicted()
        if evicted.chunks:
            events["event", "evictions", tier.name] = evicted.chunks
            events["event", "evicted_bytes", tier.name] = evicted.nbytes
    return events


def _drift(guard: DriftGuard | None) -> Iterable[Drift]:
    for state in guard.states()[:MOST_DRIFT] if guard else ():
        yield Drift(
            sender=state.sender,
            receiver=state.receiver,
            drifted=state.drifted,
            samples=state.samples,
            agreement=state.agreement,
            kl=None if state.kl is None else min(state.kl, 1e9),
            observed=state.observed,
        )


class _Seen:
    """The chunks that were used last, by receiver."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._chunks: OrderedDict[int, None] = OrderedDict()

    def first(self, receiver: str, info: ChunkInfo) -> bool:
        """Whether `receiver` uses the chunk for the first time, as far as this remembers."""
        name = hash((receiver, info.key))
        with self._lock:
            if name in self._chunks:
                self._chunks.move_to_end(name)
                return False
            self._chunks[name] = None
            if len(self._chunks) > self._size:
                self._chunks.popitem(last=False)
        return True
