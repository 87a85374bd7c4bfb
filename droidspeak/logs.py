"""Warnings that come with requests, at a bounded rate.

    _log = limited(logging.getLogger(__name__))

A store that corrupts, or a pair that may not share, would else say so at every request. The same template of
one logger passes once in `PERIOD` seconds; the next that passes tells how many were left out. Debug and info
lines, errors and what carries a traceback pass as they are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["PERIOD", "RateLimit", "forget_all", "limited"]

PERIOD = 30.0


@dataclass
class _Seen:
    at: float
    left_out: int = 0


class RateLimit(logging.Filter):
    """Lets the same warning through once in `period` seconds. Threads may share it."""

    def __init__(self, period: float = PERIOD, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._period, self._clock = period, clock
        self._lock = threading.Lock()
        self._seen: dict[object, _Seen] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` passes; one that passes after others were left out says so."""
        if record.levelno != logging.WARNING or record.exc_info:
            return True
        with self._lock:
            now = self._clock()
            seen = self._seen.get(record.msg)
            if seen is not None and now - seen.at < self._period:
                seen.left_out += 1
                return False
            self._seen[record.msg] = _Seen(now)
        if seen is not None and seen.left_out:
            record.msg = (
                f"{record.getMessage()} (and {seen.left_out} more in the {now - seen.at:.0f} s before)"
            )
            record.args = ()
        return True

    def forget(self) -> None:
        """Lets everything through once more."""
        with self._lock:
            self._seen.clear()


_LIMITS: list[RateLimit] = []


def limited(logger: logging.Logger) -> logging.Logger:
    """`logger`, whose warnings come at a bounded rate from now on."""
    limit = RateLimit()
    _LIMITS.append(limit)
    logger.addFilter(limit)
    return logger


def forget_all() -> None:
    """Lets every warning through once more."""
    for limit in _LIMITS:
        limit.forget()
