"""Promotion: copies chunks into faster tiers in the background.

Promotion only saves time later, so it never holds a request: the queue is short, and what finds it
full is forgotten. The same key is queued once.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable

from droidspeak.errors import StorageError
from droidspeak.storage.container import Chunk
from droidspeak.storage.keys import ChunkKey

__all__ = ["Promoter"]

_log = logging.getLogger(__name__)


class Promoter:
    """One thread that calls `promote(key, chunk)` for the keys it is offered.

    Args:
        promote: given the whole chunk where it is at hand already, else `None`.
        depth: keys that may wait.
    """

    def __init__(self, promote: Callable[[ChunkKey, Chunk | None], None], depth: int = 64) -> None:
        self._promote, self._depth = promote, depth
        self._changed = threading.Condition()
        self._waiting: OrderedDict[ChunkKey, Chunk | None] = OrderedDict()
        self._busy: ChunkKey | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def offer(self, key: ChunkKey, chunk: Chunk | None) -> None:
        """Queues `key` unless it waits already or the queue is full."""
        with self._changed:
            if self._closed or key in self._waiting or len(self._waiting) >= self._depth:
                return
            self._waiting[key] = chunk
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="droidspeak-promotion", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def cancel(self, key: ChunkKey, timeout: float) -> None:
        """Forgets `key`, and waits (s) for its promotion to end if that is under way."""
        with self._changed:
            self._waiting.pop(key, None)
            self._changed.wait_for(lambda: self._busy != key, timeout)

    def flush(self, timeout: float) -> bool:
        """Waits until nothing is queued; whether that came in time (s)."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and self._busy is None, timeout)

    def close(self) -> None:
        """Forgets what waits and stops after the promotion under way."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                key, chunk = self._waiting.popitem(last=False)
                self._busy = key
            try:
                self._promote(key, chunk)
            except StorageError as error:
                _log.debug("chunk %s not promoted: %s", key, error)
            finally:
                with self._changed:
                    self._busy = None
                    self._changed.notify_all()
