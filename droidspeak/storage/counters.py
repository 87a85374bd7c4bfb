"""Counters: what happened how often, by name and label. They only go up.

A duration is counted in a bucket of a histogram, so that it can be added up and sent on like all else:
`NAME_bucket` by `LABEL BOUND`, and `NAME_ns` by label.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from functools import lru_cache

__all__ = ["BOUNDS", "Counters"]

BOUNDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Upper bounds of the buckets in seconds; one more, `+Inf`, has the rest."""

_BUCKETS = (*map(str, BOUNDS), "+Inf")


@lru_cache(1024)
def _keys(name: str, label: str, bucket: int) -> tuple[tuple[str, str], tuple[str, str]]:
    return (f"{name}_bucket", f"{label} {_BUCKETS[bucket]}"), (f"{name}_ns", label)


class Counters:
    """A thread-safe table `(name, label) -> count`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, name: str, label: str = "", amount: int = 1) -> None:
        with self._lock:
            self._counts[name, label] += amount

    def observe(self, name: str, seconds: float, label: str = "") -> None:
        """Counts a duration; `label` has no blanks."""
        bucket, total = _keys(name, label, bisect_left(BOUNDS, seconds))
        with self._lock:
            self._counts[bucket] += 1
            self._counts[total] += int(seconds * 1e9)

    def get(self, name: str, label: str | None = None) -> int:
        """The count of one label, or of all labels of `name`."""
        with self._lock:
            return sum(n for (key, tag), n in self._counts.items() if key == name and label in (None, tag))

    def snapshot(self) -> dict[str, dict[str, int]]:
        """All counts as `{name: {label: count}}`."""
        table: dict[str, dict[str, int]] = {}
        with self._lock:
            for (name, label), count in sorted(self._counts.items()):
                table.setdefault(name, {})[label] = count
        return table
