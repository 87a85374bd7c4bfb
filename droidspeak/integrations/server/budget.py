"""A budget of bytes that several threads share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["BytesBudget", "OverBudget"]


class OverBudget(Exception):
    """The bytes could not be had in time."""


class BytesBudget:
    """At most `capacity` bytes are held at a time. Nobody starves: who waits longest is served first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held = 0
        self._changed = threading.Condition()
        self._queue: list[object] = []

    @property
    def held(self) -> int:
        """Bytes that are held now."""
        return self._held

    @contextmanager
    def take(self, nbytes: int, timeout: float) -> Iterator[None]:
        """Holds `nbytes` inside. Raises `OverBudget` after `timeout` s, or if they can never be had."""
        self._acquire(nbytes, timeout)
        try:
            yield
        finally:
            with self._changed:
                self._held -= nbytes
                self._changed.notify_all()

    def _acquire(self, nbytes: int, timeout: float) -> None:
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                if nbytes > self._capacity or not self._changed.wait_for(
                    lambda: self._queue[0] is ticket and self._held + nbytes <= self._capacity, timeout
                ):
                    raise OverBudget(f"{nbytes} bytes of {self._capacity}, {self._held} held")
                self._held += nbytes
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
