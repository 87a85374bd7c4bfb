"""Questions that may be dear: what a tier holds is known to a catalog, but S3 lists a whole bucket for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from droidspeak.errors import StorageError

__all__ = ["Rested"]

_REST = 100
T = TypeVar("T")


class Rested(Generic[T]):
    """The answer to one question, which is asked again only after 100 times as long as it took.

    Threads that come while it is asked wait for the answer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due = 0.0
        self._last: T | None = None

    def get(self, ask: Callable[[], T]) -> T | None:
        """What `ask` answers, or has answered; `None` where that was a `StorageError`."""
        with self._lock:
            began = time.monotonic()
            if began >= self._due:
                try:
                    self._last = ask()
                except StorageError:
                    self._last = None
                ended = time.monotonic()
                self._due = ended + _REST * (ended - began)
            return self._last
