"""What happened to the objects of a plug-in: counted by reason, and told in a line now and then."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from droidspeak.errors import ChunkCorrupt, ChunkIncomplete, StorageError, TierFull, TierTimeout
from droidspeak.storage import Counters

__all__ = ["Tally", "reason_of"]

_log = logging.getLogger(__name__)
_REASONS: dict[type[StorageError], str] = {
    ChunkCorrupt: "corrupt",
    ChunkIncomplete: "incomplete",
    TierTimeout: "timeout",
    TierFull: "full",
}


def reason_of(error: StorageError) -> str:
    """The label under which `error` is counted."""
    return next((name for kind, name in _REASONS.items() if isinstance(error, kind)), "unavailable")


class Tally:
    """Counters with a log line for failures, at most one in `interval` s.

    Attributes:
        counters: `hits` and `stored` count objects (layers count one by one); `misses` and `not_stored`
            have the reason as their label.
    """

    def __init__(
        self, name: str, interval: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.counters = Counters()
        self._name, self._interval, self._clock = name, interval, clock
        self._lock = threading.Lock()
        self._told_at = float("-inf")
        self._silent = 0

    def done(self, name: str, amount: int = 1) -> None:
        """Counts what went well."""
        self.counters.add(name, amount=amount)

    def failed(self, name: str, reason: str, message: str) -> None:
        """Counts what went wrong, and says so unless something was said lately."""
        self.counters.add(name, reason)
        with self._lock:
            now = self._clock()
            if now - self._told_at < self._interval:
                self._silent += 1
                return
            silent, self._silent, self._told_at = self._silent, 0, now
        more = f" (and {silent} other failures since the last such line)" if silent else ""
        _log.warning("%s: %s: %s: %s%s", self._name, name.replace("_", " "), reason, message, more)
