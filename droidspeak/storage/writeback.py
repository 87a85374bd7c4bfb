"""Write-back: chunks on their way to a slower tier.

    put -> waiting -> being written -> stored | failed

The queue is bounded in bytes; `put` waits for room (back-pressure) and gives up at its timeout. What
waits can be read (`pending`), so a chunk is never out of sight between two tiers.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from droidspeak.errors import StorageError
from droidspeak.storage.container import Chunk
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.tier import Tier

__all__ = ["WriteBack"]


class WriteBack:
    """One thread that writes chunks to `tier` in the order in which they came.

    Args:
        capacity: bytes that may wait. One chunk is always accepted, however large.
        on_error: told of every chunk that could not be written.
    """

    def __init__(self, tier: Tier, capacity: int, on_error: Callable[[Chunk, StorageError], None]) -> None:
        self._tier, self._capacity, self._on_error = tier, capacity, on_error
        self._changed = threading.Condition()
        self._waiting: OrderedDict[ChunkKey, Chunk] = OrderedDict()
        self._writing: Chunk | None = None
        self._bytes = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that wait or are being written."""
        return self._bytes

    def put(self, chunk: Chunk, timeout: float) -> bool:
        """Queues `chunk`, replacing one of the same key; `False` if there was no room in `timeout` s."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or self._fits(chunk), timeout) or self._closed:
                return False
            self._discard(chunk.key)
            self._waiting[chunk.key] = chunk
            self._bytes += chunk.nbytes
            self._start()
            self._changed.notify_all()
            return True

    def pending(self, key: ChunkKey) -> Chunk | None:
        """The newest chunk of `key` that is not in the tier yet."""
        with self._changed:
            if (chunk := self._waiting.get(key)) is not None:
                return chunk
            return self._writing if self._writing is not None and self._writing.key == key else None

    def keys(self) -> list[ChunkKey]:
        """Keys that wait or are being written."""
        with self._changed:
            return [*self._waiting, *([self._writing.key] if self._writing else [])]

    def cancel(self, key: ChunkKey, timeout: float) -> bool:
        """Forgets `key` and waits until it is not being written; whether it was waiting."""
        with self._changed:
            waited = self._discard(key)
            self._changed.wait_for(lambda: self._writing is None or self._writing.key != key, timeout)
            return waited

    def flush(self, timeout: float) -> bool:
        """Waits until everything queued so far is written; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and self._writing is None, timeout)

    def close(self, timeout: float) -> bool:
        """Flushes and stops the thread; whether everything was written in time."""
        done = self.flush(timeout)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        return done

    def _fits(self, chunk: Chunk) -> bool:
        return self._bytes == 0 or self._bytes + chunk.nbytes <= self._capacity

    def _discard(self, key: ChunkKey) -> bool:
        chunk = self._waiting.pop(key, None)
        if chunk is not None:
            self._bytes -= chunk.nbytes
            self._changed.notify_all()
        return chunk is not None

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._serve, name=f"droidspeak-writeback-{self._tier.name}", daemon=True
            )
            self._thread.start()

    def _serve(self) -> None:
        while (chunk := self._take()) is not None:
            try:
                self._tier.write(chunk)
            except StorageError as error:
                self._on_error(chunk, error)
            finally:
                self._finish(chunk)

    def _take(self) -> Chunk | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return None
            _, self._writing = self._waiting.popitem(last=False)
            return self._writing

    def _finish(self, chunk: Chunk) -> None:
        with self._changed:
            self._writing = None
            self._bytes -= chunk.nbytes
            self._changed.notify_all()
