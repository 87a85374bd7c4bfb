"""A tier that cannot be opened yet: a folder that is not mounted, not writable, or on a full disk.

A process must come up and answer without its cache. Each call tries to open the tier and raises
`TierUnavailable` until that works; the guard in front of it keeps the tries far between.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from droidspeak.errors import TierClosed
from droidspeak.storage.tier import Tier, TierUsage
from droidspeak.storage.wrappers import Call, WrapperTier

__all__ = ["LateTier"]

T = TypeVar("T")


class LateTier(WrapperTier):
    """Opens a tier at the first call for which that works, and is that tier from then on.

    Args:
        open_tier: opens it; raises `TierUnavailable` while it cannot.
    """

    def __init__(self, open_tier: Callable[[], Tier], name: str) -> None:
        self.name = name
        self._open = open_tier
        self._lock = threading.Lock()
        self._opened = self._closed = False

    def _around(self, call: Call[T]) -> T:
        with self._lock:
            if self._closed:
                raise TierClosed(f"tier {self.name} is closed")
            if not self._opened:
                self.tier = self._open()
                self._opened = True
        return call.run()

    def evicted(self) -> TierUsage:
        return self.tier.evicted() if self._opened else TierUsage(0, 0)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._opened:
                self.tier.close()

    def __repr__(self) -> str:
        return Tier.__repr__(self)
