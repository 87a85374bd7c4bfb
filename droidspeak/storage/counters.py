"""Counters: what happened how often, by name and label. They only go up."""

from __future__ import annotations

import threading
from collections import Counter

__all__ = ["Counters"]


class Counters:
    """A thread-safe table `(name, label) -> count`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, name: str, label: str = "", amount: int = 1) -> None:
        with self._lock:
            self._counts[name, label] += amount

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
