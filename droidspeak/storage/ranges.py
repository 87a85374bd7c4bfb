"""What tiers that read ranges over a network share: headers by version, and requests side by side."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from droidspeak.errors import TierUnavailable
from droidspeak.storage.container import ChunkHeader
from droidspeak.storage.keys import ChunkKey

__all__ = ["SideBySide", "VersionedHeaders"]

T = TypeVar("T")
U = TypeVar("U")


class VersionedHeaders:
    """The headers read last, each with the version (ETag) it was read from."""

    def __init__(self, limit: int = 1024) -> None:
        self._limit = limit
        self._held: OrderedDict[ChunkKey, tuple[str, ChunkHeader]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: ChunkKey) -> tuple[str, ChunkHeader] | None:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def remember(self, key: ChunkKey, etag: str, header: ChunkHeader) -> None:
        with self._lock:
            self._held[key] = etag, header
            self._held.move_to_end(key)
            while len(self._held) > self._limit:
                self._held.popitem(last=False)

    def forget(self, key: ChunkKey) -> None:
        with self._lock:
            self._held.pop(key, None)


class SideBySide:
    """Threads for the requests that one tier makes at the same time.

    Args:
        count: threads at most; they are started when they are needed.
        name: of the tier.
    """

    def __init__(self, count: int, name: str) -> None:
        self._name = name
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=f"droidspeak-{name}")

    def all(self, call: Callable[[T], U], items: Iterable[T]) -> list[U]:
        """`call` of each item. On an error, too, no call is still under way afterwards.

        Raises:
            TierUnavailable: the threads are closed.
        """
        todo = list(items)
        if len(todo) == 1:
            return [call(todo[0])]
        try:
            futures = [self._pool.submit(call, item) for item in todo]
        except RuntimeError as error:
            raise TierUnavailable(f"tier {self._name}: {error}") from None
        wait(futures)
        answers = []
        try:
            while futures:
                answers.append(futures.pop(0).result())
        finally:
            # An error's traceback keeps this frame, which must not keep the error: nobody would let go.
            futures.clear()
        return answers

    def those(self, test: Callable[[T], bool], items: Iterable[T]) -> list[T]:
        """The items for which `test` holds. Raises as `all`."""
        todo = list(items)
        return [item for item, holds in zip(todo, self.all(test, todo), strict=True) if holds]

    def close(self) -> None:
        """Waits for the calls under way."""
        self._pool.shutdown()
