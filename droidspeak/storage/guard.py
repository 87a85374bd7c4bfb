"""The guard around one tier: a deadline for each call, and a breaker that skips a failing tier.

A call runs on one of the guard's own daemon threads, so a hung disk or socket can be left behind
without holding the request, and without holding the end of the process. Reading and writing have a
breaker each: a full disk must still be read.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from droidspeak.errors import StorageError, TierFull, TierTimeout, TierUnavailable
from droidspeak.storage.breaker import BreakerState, CircuitBreaker
from droidspeak.storage.container import Chunk, Slot
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.tier import ChunkInfo, Tier, TierUsage

__all__ = ["GuardedTier", "Limits"]

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How long one call may take, in seconds, and when a failing tier is tried again."""

    read_deadline: float = 5.0
    write_deadline: float = 60.0
    threshold: int = 1
    cooldown: float = 5.0
    max_cooldown: float = 300.0
    threads: int = 4

    def breaker(self) -> CircuitBreaker:
        return CircuitBreaker(self.threshold, self.cooldown, self.max_cooldown)


class GuardedTier(Tier):
    """`tier` with deadlines and breakers; its own errors pass through unchanged.

    In-memory tiers are called directly: they cannot hang, and a thread hop would cost more than the hit.
    """

    def __init__(self, tier: Tier, limits: Limits | None = None) -> None:
        self.tier, self.name = tier, tier.name
        self.in_memory, self.best_read = tier.in_memory, tier.best_read  # type: ignore[misc]
        self._limits = limits or Limits()
        self._reading, self._writing = self._limits.breaker(), self._limits.breaker()
        self._threads = None if tier.in_memory else _DaemonThreads(self._limits.threads, tier.name)
        self._full = False

    @property
    def state(self) -> BreakerState:
        """Of the reading side."""
        return self._reading.state

    def head(self, key: ChunkKey) -> ChunkInfo | None:
        return self._read(lambda: self.tier.head(key))

    def leading(self, keys: Sequence[ChunkKey]) -> list[ChunkInfo]:
        return self._read(lambda: self.tier.leading(keys))

    def read(
        self,
        key: ChunkKey,
        slots: Collection[Slot] | None = None,
        into: Mapping[Slot, torch.Tensor] | None = None,
    ) -> Chunk | None:
        return self._read(lambda: self.tier.read(key, slots, into))

    def write(self, chunk: Chunk) -> None:
        try:
            self._write(lambda: self.tier.write(chunk))
        except TierFull as error:
            if not self._full:
                _log.warning("tier %s is full: %s", self.name, error)
            self._full = True
            raise
        self._full = False

    def delete(self, key: ChunkKey) -> bool:
        return self._write(lambda: self.tier.delete(key))

    def pin(self, key: ChunkKey) -> bool:
        return self._write(lambda: self.tier.pin(key))

    def unpin(self, key: ChunkKey) -> bool:
        return self._write(lambda: self.tier.unpin(key))

    def quarantine(self, key: ChunkKey) -> None:
        self._write(lambda: self.tier.quarantine(key))

    def keys(self) -> Iterator[ChunkKey]:
        return self.tier.keys()

    def usage(self) -> TierUsage:
        return self._read(self.tier.usage)

    def close(self) -> None:
        if self._threads:
            self._threads.close()
        self.tier.close()

    def _read(self, call: Callable[[], T]) -> T:
        return self._run(call, self._reading, self._limits.read_deadline)

    def _write(self, call: Callable[[], T]) -> T:
        return self._run(call, self._writing, self._limits.write_deadline)

    def _run(self, call: Callable[[], T], breaker: CircuitBreaker, deadline: float) -> T:
        if self._threads is None:
            return call()
        if not breaker.allow():
            raise TierUnavailable(f"tier {self.name} is skipped until it answers again")
        try:
            result = self._threads.run(call, deadline)
        except (TierUnavailable, TierTimeout) as error:
            if breaker.fail():
                _log.warning("tier %s fails and is skipped for a while: %s", self.name, error)
            raise
        except StorageError:
            self._answered(breaker)
            raise
        self._answered(breaker)
        return result

    def _answered(self, breaker: CircuitBreaker) -> None:
        if breaker.succeed():
            _log.warning("tier %s answers again", self.name)


class _DaemonThreads:
    """Runs calls with a deadline. A call that overstays keeps its thread; the caller goes on."""

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._started = 0
        self._idle = 0
        self._lock = threading.Lock()

    def run(self, call: Callable[[], T], deadline: float) -> T:
        future: Future[T] = Future()
        self._start_if_needed()
        self._calls.put((future, call))
        try:
            return future.result(deadline)
        except TimeoutError:
            if future.done():
                return future.result()
            future.cancel()
            raise TierTimeout(f"tier {self._name} did not answer within {deadline:g} s") from None

    def close(self) -> None:
        with self._lock:
            for _ in range(self._started):
                self._calls.put(None)
            self._started = 0

    def _start_if_needed(self) -> None:
        with self._lock:
            if self._idle == 0 and self._started < self._count:
                self._started += 1
                threading.Thread(target=self._serve, name=f"droidspeak-{self._name}", daemon=True).start()

    def _serve(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            job = self._calls.get()
            with self._lock:
                self._idle -= 1
            if job is None:
                return
            future, call = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - it is handed to the caller, whatever it is
                future.set_exception(error)
            del future, call, job
