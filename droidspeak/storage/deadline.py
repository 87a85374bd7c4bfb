"""Calls with a deadline, on daemon threads: what hangs is left behind.

A call that overstays keeps its thread until it ends. It holds neither its caller nor the end of the
process, but whatever it was given stays alive for it, and it may still take effect.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from droidspeak.errors import TierTimeout, TierUnavailable

__all__ = ["DeadlineThreads"]

T = TypeVar("T")
_Job = tuple[Future[Any], Callable[[], Any]]


class DeadlineThreads:
    """Runs calls and waits for each no longer than its deadline.

    Args:
        count: threads at most; they are started when they are needed.
        name: whose calls these are, for messages.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._outstanding = 0
        self._last: _Job | None = None

    def run(self, call: Callable[[], T], deadline: float) -> T:
        """The call's answer, or its error.

        Raises:
            TierTimeout: no answer after `deadline` s. A call that has not begun by then never will.
            TierUnavailable: the threads are closed.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._last is not None:
                raise TierUnavailable(f"{self._name} is closed")
            self._outstanding += 1
            self._start_if(self._outstanding > self._threads)
            self._jobs.put((future, call))
        return self._await(future, deadline)

    def close(self, last: Callable[[], None], deadline: float) -> None:
        """Makes the call `last` when all others have ended, then ends the threads. Once.

        Raises:
            TierTimeout: that took longer than `deadline` s; it will still happen.
        """
        future: Future[None] = Future()
        with self._lock:
            if self._last is not None:
                return
            self._last = (future, last)
            self._start_if(self._threads == 0)
            for _ in range(self._threads):
                self._jobs.put(None)
        self._await(future, deadline)

    def _await(self, future: Future[T], deadline: float) -> T:
        try:
            return future.result(deadline)
        except TimeoutError:
            # A `TierTimeout` of the call's own comes by here too: then the call is done.
            if future.cancel() or not future.done():
                raise TierTimeout(f"{self._name} did not answer within {deadline:g} s") from None
            return future.result()

    def _start_if(self, needed: bool) -> None:
        if needed and self._threads < self._count:
            threading.Thread(target=self._serve, name=f"droidspeak {self._name}", daemon=True).start()
            self._threads += 1

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            _make(*job)
            # What the call was given must not stay alive while the thread waits for the next one.
            del job
            with self._lock:
                self._outstanding -= 1
        with self._lock:
            self._threads -= 1
            last = self._last if self._threads == 0 else None
        if last:
            _make(*last)


def _make(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001 - it is handed to the caller, whatever it is
        future.set_exception(error)
