"""How fast chunks come out of each tier, as measured while streams load them.

What counts is what an engine gets: decoded bytes per second in which at least one loader was reading or
decoding. A tier's figure is forgotten after a while: else a tier that was slow once might never be asked,
and so never measured, again.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from droidspeak.storage import Counters

__all__ = ["Bandwidths", "Transfer", "TransferClock"]

_KEPT = 0.7
_FORGOTTEN_AFTER = 60.0


@dataclass(frozen=True, slots=True)
class Transfer:
    """Decoded bytes that came out of `tier`, and the seconds in which it was read."""

    tier: str
    nbytes: int
    seconds: float


class TransferClock:
    """Times the reads of one stream. Of reads at one time from one tier the time counts once.

    The caller sees to it that one thread at a time calls.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._reading: defaultdict[str, int] = defaultdict(int)
        self._since: dict[str, float] = {}
        self._nbytes: defaultdict[str, int] = defaultdict(int)
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def start(self, tier: str) -> None:
        """A read of `tier` begins."""
        if not self._reading[tier]:
            self._since[tier] = self._now()
        self._reading[tier] += 1

    def stop(self, tier: str, nbytes: int) -> None:
        """A read of `tier` has given `nbytes` decoded bytes."""
        self._reading[tier] -= 1
        self._nbytes[tier] += nbytes
        if not self._reading[tier]:
            self._seconds[tier] += self._now() - self._since[tier]

    def transfers(self) -> Iterator[Transfer]:
        """What each tier gave; reads under way do not count."""
        for tier, nbytes in self._nbytes.items():
            yield Transfer(tier, nbytes, self._seconds[tier])


@dataclass
class _Flow:
    nbytes: float
    seconds: float
    seen: float


class Bandwidths:
    """Estimates by tier name. Threads may share it.

    Args:
        counters: gets `load_bytes` and `load_ns` of all transfers, by tier.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, counters: Counters | None = None) -> None:
        self._now, self._counters = now, counters
        self._lock = threading.Lock()
        self._flows: dict[str, _Flow] = {}

    def add(self, transfer: Transfer) -> None:
        """Takes a finished transfer; each counts 0.7 of what the next one does, by its size."""
        if not transfer.nbytes or transfer.seconds <= 0:
            return
        if self._counters is not None:
            self._counters.add("load_bytes", transfer.tier, transfer.nbytes)
            self._counters.add("load_ns", transfer.tier, int(transfer.seconds * 1e9))
        with self._lock:
            flow = self._known(transfer.tier) or _Flow(0.0, 0.0, 0.0)
            self._flows[transfer.tier] = _Flow(
                _KEPT * flow.nbytes + transfer.nbytes, _KEPT * flow.seconds + transfer.seconds, self._now()
            )

    def get(self, tier: str) -> float | None:
        """Bytes per second, `None` if nothing was measured in the last minute."""
        with self._lock:
            flow = self._known(tier)
            return flow.nbytes / flow.seconds if flow else None

    def over(self, tiers: Collection[str]) -> float | None:
        """Bytes per second of equal parts from each of `tiers` in turn; `None` if one is not known."""
        parts = Counter(tiers)
        seconds = 0.0
        for tier, count in parts.items():
            speed = self.get(tier)
            if speed is None:
                return None
            seconds += count / speed
        return len(tiers) / seconds if parts else None

    def _known(self, tier: str) -> _Flow | None:
        flow = self._flows.get(tier)
        return flow if flow and self._now() - flow.seen <= _FORGOTTEN_AFTER else None
