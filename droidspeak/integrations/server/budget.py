"""A budget of bytes that several threads share."""

from __future__ import annotations

import threading
from collections import deque

__all__ = ["BytesBudget", "OverBudget"]


class OverBudget(Exception):
    """The bytes could not be had in time."""


class BytesBudget:
    """At most `capacity` bytes are held at a time. Nobody starves: who has waited longest is next."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held = 0
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    @property
    def held(self) -> int:
        """Bytes that are held now."""
        return self._held

    def take(self, nbytes: int, timeout: float) -> None:
        """Holds `nbytes` until they are given back.

        Raises:
            OverBudget: they were not free within `timeout` s, or never can be.
        """
        with self._changed:
            if self._queue or self._held + nbytes > self._capacity:
                self._wait(nbytes, timeout)
            self._held += nbytes

    def give_back(self, nbytes: int) -> None:
        """Lets go of `nbytes`."""
        with self._changed:
            self._held -= nbytes
            if self._queue:
                self._changed.notify_all()

    def _wait(self, nbytes: int, timeout: float) -> None:
        ticket = object()
        self._queue.append(ticket)
        try:
            if nbytes > self._capacity or not self._changed.wait_for(
                lambda: self._queue[0] is ticket and self._held + nbytes <= self._capacity, timeout
            ):
                raise OverBudget(f"{nbytes} of {self._capacity} bytes, {self._held} are held")
        finally:
            self._queue.remove(ticket)
            self._changed.notify_all()
