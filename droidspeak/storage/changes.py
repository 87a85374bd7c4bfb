"""Changes of one key happen one after the other, and leave a stamp.

Whoever read a chunk and wants to keep it somewhere compares the stamp from before the read with the one
in its own turn: if they differ, what was read may no longer be what is stored.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from droidspeak.storage.keys import ChunkKey

__all__ = ["Changes"]

_STAMPS = 4096


@dataclass
class _Turn:
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0


class Changes:
    """Turns and stamps by key. Keys share stamps, so a stamp may change without a change of its key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[ChunkKey, _Turn] = {}
        self._stamps = [0] * _STAMPS

    def stamp(self, key: ChunkKey) -> int:
        """A number that is another one after every change of `key`."""
        return self._stamps[hash(key) % _STAMPS]

    @contextmanager
    def turn(self, key: ChunkKey) -> Iterator[None]:
        """The only change of `key` at this time. The stamp changes at its end."""
        with self._lock:
            turn = self._turns.setdefault(key, _Turn())
            turn.users += 1
        try:
            with turn.lock:
                try:
                    yield
                finally:
                    self._mark(key)
        finally:
            with self._lock:
                turn.users -= 1
                if not turn.users:
                    del self._turns[key]

    def _mark(self, key: ChunkKey) -> None:
        with self._lock:
            self._stamps[hash(key) % _STAMPS] += 1
