"""A circuit breaker: a slow or dead tier costs a bounded delay a few times, then is skipped.

closed --`threshold` failures in a row--> open --after `cooldown` s, one call is let through-->
half-open --success--> closed, --failure--> open for twice as long, up to `max_cooldown`.

A tier that fails again within one cooldown of having come back has not come back: the cooldown goes
on doubling. So a tier that answers lookups and then hangs on every read is tried less and less often.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import StrEnum

__all__ = ["BreakerState", "CircuitBreaker"]


class BreakerState(StrEnum):
    """Whether calls are made: all, none, or one as a probe."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Counts failures in a row and says whether the next call may be tried.

    Args:
        threshold: failures in a row that open it.
        cooldown, max_cooldown: seconds it stays open at first, and at most.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        threshold: int = 1,
        cooldown: float = 5.0,
        max_cooldown: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._threshold, self._first, self._longest, self._clock = threshold, cooldown, max_cooldown, clock
        self._lock = threading.Lock()
        self._failures = 0
        self._cooldown = cooldown
        self._retry_at: float | None = None
        self._trusted_from = -float("inf")
        self._probing = False

    @property
    def state(self) -> BreakerState:
        with self._lock:
            if self._retry_at is None:
                return BreakerState.CLOSED
            return BreakerState.HALF_OPEN if self._probing else BreakerState.OPEN

    def allow(self) -> bool:
        """Whether to try. While open, one caller per cooldown gets `True` and is the probe."""
        with self._lock:
            if self._retry_at is None:
                return True
            if self._clock() < self._retry_at:
                return False
            # The probe holds the door for one cooldown: one that never reports must not close it for good.
            self._probing = True
            self._retry_at = self._clock() + self._cooldown
            return True

    def succeed(self) -> bool:
        """The call worked; whether that closed an open breaker."""
        with self._lock:
            recovered = self._retry_at is not None
            if recovered:
                self._trusted_from = self._clock() + self._cooldown
            self._failures, self._retry_at, self._probing = 0, None, False
            return recovered

    def fail(self) -> bool:
        """The call failed; whether that opened a closed breaker."""
        with self._lock:
            self._failures += 1
            was_closed = self._retry_at is None
            if was_closed and self._failures < self._threshold:
                return False
            if was_closed and self._clock() >= self._trusted_from:
                self._cooldown = self._first
            elif was_closed or self._probing:
                self._cooldown = min(2 * self._cooldown, self._longest)
            self._retry_at, self._probing = self._clock() + self._cooldown, False
            return was_closed
