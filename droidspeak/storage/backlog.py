"""A backlog: work by key that a thread of its own does in the order in which it came.

    add -> waiting -> under way -> done

It is bounded in bytes: `add` waits for room (back-pressure) and gives up at its timeout. What has been
added can be looked up until it is done. The thread ends soon after the work does, so that an idle backlog
costs nothing and one that is dropped leaves nothing behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from droidspeak.errors import TierTimeout
from droidspeak.storage.keys import ChunkKey

__all__ = ["Backlog"]

_LINGER_SECONDS = 0.5  # to start a thread for every item would cost more than many items do
T = TypeVar("T")


@dataclass(frozen=True)
class _Task(Generic[T]):
    key: ChunkKey
    item: T
    nbytes: int
    serial: int


class Backlog(Generic[T]):
    """Items that are handed to `work` one by one.

    Args:
        work: what to do with an item.
        capacity: bytes of all items, with the one under way. One item is accepted however large.
        name: of the thread.
    """

    def __init__(self, work: Callable[[T], None], capacity: int, name: str) -> None:
        self._work, self._capacity, self._name = work, capacity, name
        self._changed = threading.Condition()
        self._waiting: dict[ChunkKey, _Task[T]] = {}
        self._current: _Task[T] | None = None
        self._bytes = 0
        self._serial = 0
        self._running = False
        self._closed = False

    @property
    def nbytes(self) -> int:
        """Bytes of what waits or is under way."""
        return self._bytes

    @property
    def capacity(self) -> int:
        """The most of it."""
        return self._capacity

    def add(self, key: ChunkKey, item: T, nbytes: int, timeout: float) -> bool:
        """Takes `item`, in the place of one that waits under `key`.

        Returns `False` if there was no room within `timeout` s, or the backlog is closed.
        """
        with self._changed:
            ready = self._changed.wait_for(lambda: self._closed or self._has_room(key, nbytes), timeout)
            if not ready or self._closed:
                return False
            replaced = self._waiting.get(key)
            if replaced is None:
                self._serial += 1
            serial = replaced.serial if replaced else self._serial
            self._waiting[key] = _Task(key, item, nbytes, serial)
            self._bytes += nbytes - (replaced.nbytes if replaced else 0)
            self._start()
            return True

    def get(self, key: ChunkKey) -> T | None:
        """The newest item of `key` that waits or is under way."""
        return self.among([key]).get(key)

    def among(self, keys: Iterable[ChunkKey]) -> dict[ChunkKey, T]:
        """The newest items of those `keys` that wait or are under way."""
        with self._changed:
            if self._oldest() > self._serial:
                return {}
            tasks = {key: self._newest(key) for key in keys}
        return {key: task.item for key, task in tasks.items() if task}

    def keys(self) -> list[ChunkKey]:
        """Keys that wait or are under way."""
        with self._changed:
            return list({task.key: None for task in (self._current, *self._waiting.values()) if task})

    def cancel(self, key: ChunkKey, timeout: float) -> bool:
        """Drops what waits under `key`, and waits for what is under way; whether anything waited.

        Raises:
            TierTimeout: it is still under way after `timeout` s.
        """
        with self._changed:
            task = self._waiting.pop(key, None)
            if task is not None:
                self._bytes -= task.nbytes
                self._changed.notify_all()
            if not self._changed.wait_for(lambda: not self._is_current(key), timeout):
                raise TierTimeout(f"{self._name}: chunk {key} is still under way after {timeout:g} s")
        return task is not None

    def settle(self, key: ChunkKey, timeout: float) -> bool:
        """Waits until all of `key` is done; whether that came within `timeout` s."""
        with self._changed:
            return self._changed.wait_for(
                lambda: key not in self._waiting and not self._is_current(key), timeout
            )

    def flush(self, timeout: float) -> bool:
        """Waits until everything added before this call is done; whether that came within `timeout` s."""
        with self._changed:
            last = self._serial
            return self._changed.wait_for(lambda: self._oldest() > last, timeout)

    def clear(self) -> None:
        """Drops all that waits."""
        with self._changed:
            self._bytes -= sum(task.nbytes for task in self._waiting.values())
            self._waiting.clear()
            self._changed.notify_all()

    def close(self, timeout: float) -> bool:
        """Takes nothing more and flushes; whether all was done within `timeout` s. The rest is dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        done = self.flush(timeout)
        self.clear()
        return done

    # The caller holds the lock

    def _has_room(self, key: ChunkKey, nbytes: int) -> bool:
        replaced = self._waiting.get(key)
        others = self._bytes - (replaced.nbytes if replaced else 0)
        return others == 0 or others + nbytes <= self._capacity

    def _newest(self, key: ChunkKey) -> _Task[T] | None:
        return self._waiting.get(key) or (self._current if self._is_current(key) else None)

    def _is_current(self, key: ChunkKey) -> bool:
        return self._current is not None and self._current.key == key

    def _oldest(self) -> int:
        task = self._current or next(iter(self._waiting.values()), None)
        return task.serial if task else self._serial + 1

    def _start(self) -> None:
        if self._waiting and self._running:
            self._changed.notify_all()
        elif self._waiting:
            threading.Thread(target=self._serve, name=self._name, daemon=True).start()
            self._running = True

    # The thread

    def _serve(self) -> None:
        try:
            # A frame of its own: while this thread waits, it must not keep what it did last alive.
            while self._do_next():
                pass
        finally:
            # A bug in `work` ends this thread with its traceback, but not the work that still waits.
            with self._changed:
                self._running = False
                self._start()

    def _do_next(self) -> bool:
        task = self._take()
        if task is None:
            return False
        try:
            self._work(task.item)
        finally:
            self._finish(task)
        return True

    def _take(self) -> _Task[T] | None:
        with self._changed:
            if not self._waiting and not self._closed:
                self._changed.wait_for(lambda: self._waiting or self._closed, _LINGER_SECONDS)
            key = next(iter(self._waiting), None)
            self._current = None if key is None else self._waiting.pop(key)
            return self._current

    def _finish(self, task: _Task[T]) -> None:
        with self._changed:
            self._current = None
            self._bytes -= task.nbytes
            self._changed.notify_all()
