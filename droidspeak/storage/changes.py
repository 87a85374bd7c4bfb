"""Changes of one key happen one after the other, in the order in which they came, and leave a stamp.

Whoever read a chunk and wants to keep it somewhere compares the stamp from before the read with the one
in its own turn: if they differ, what was read may no longer be what is stored.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from droidspeak.storage.keys import ChunkKey

__all__ = ["Changes"]

_STAMPS = 4096


class Changes:
    """Turns and stamps by key. Keys share stamps, so a stamp may change without a change of its key."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turns: dict[ChunkKey, list[object]] = {}
        self._stamps = [0] * _STAMPS

    def stamp(self, key: ChunkKey) -> int:
        """A number that is another one after every change of `key`."""
        return self._stamps[hash(key) % _STAMPS]

    @contextmanager
    def turn(self, key: ChunkKey) -> Iterator[None]:
        """The only change of `key` at this time. The stamp changes at its end."""
        with self._changed:
            queue = self._turns.setdefault(key, [])
            queue.append(me := object())
        try:
            if queue[0] is not me:
                with self._changed:
                    self._changed.wait_for(lambda: queue[0] is me)
            yield
        finally:
            with self._changed:
                queue.remove(me)
                self._stamps[hash(key) % _STAMPS] += 1
                if queue:
                    self._changed.notify_all()
                else:
                    del self._turns[key]
