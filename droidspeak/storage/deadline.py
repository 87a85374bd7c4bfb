"""Calls with a deadline, on daemon threads: what hangs is left behind.

A call that overstays keeps its thread until it ends. It holds neither its caller nor the end of the
process, but whatever it was given stays alive for it, and it may still take effect. One that has not
begun when its caller gives up never will, and lets go of what it was given at once.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from droidspeak.errors import TierClosed, TierTimeout

__all__ = ["DeadlineThreads"]

T = TypeVar("T")


@dataclass
class _Job(Generic[T]):
    """A call, and what comes of it."""

    call: Callable[[], T] | None
    future: Future[T] = field(default_factory=Future)

    def make(self) -> None:
        call, self.call = self.call, None
        if call is None or not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is handed to the caller, whatever it is
            self.future.set_exception(error)
            # The error's traceback keeps this frame, which must not keep the error: nobody would let go.
            del self

    def cancel(self) -> bool:
        """Whether the call had not begun, and never will."""
        cancelled = self.future.cancel()
        if cancelled:
            self.call = None
        return cancelled


class DeadlineThreads:
    """Runs calls and waits for each no longer than its deadline.

    Args:
        count: threads at most; they are started when they are needed.
        name: whose calls these are, for messages.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._outstanding = 0
        self._last: _Job[None] | None = None

    def run(self, call: Callable[[], T], deadline: float) -> T:
        """The call's answer, or its error.

        Raises:
            TierTimeout: no answer after `deadline` s.
            TierClosed: the threads are closed.
        """
        return self._await(self._submit(call), deadline)

    def close(self, last: Callable[[], None], deadline: float) -> None:
        """Makes the call `last` when all others have ended, then ends the threads. Once.

        Raises:
            TierTimeout: that took longer than `deadline` s; it will still happen.
        """
        with self._lock:
            if self._last is not None:
                return
            self._last = job = _Job(last)
            self._start_if(self._threads == 0)
            for _ in range(self._threads):
                self._jobs.put(None)
        self._await(job, deadline, cancel=False)

    def _submit(self, call: Callable[[], T]) -> _Job[T]:
        job = _Job(call)
        with self._lock:
            if self._last is not None:
                raise TierClosed(f"{self._name} is closed")
            self._outstanding += 1
            self._start_if(self._outstanding > self._threads)
            self._jobs.put(job)
        return job

    def _await(self, job: _Job[T], deadline: float, *, cancel: bool = True) -> T:
        try:
            return job.future.result(deadline)
        except TimeoutError:
            # A `TierTimeout` of the call's own comes by here too: then the call is done.
            if (cancel and job.cancel()) or not job.future.done():
                raise TierTimeout(f"{self._name} did not answer within {deadline:g} s") from None
            return job.future.result()
        finally:
            del job  # as in `_Job.make`

    def _start_if(self, needed: bool) -> None:
        if needed and self._threads < self._count:
            threading.Thread(target=self._serve, name=f"droidspeak {self._name}", daemon=True).start()
            self._threads += 1

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.make()
            # Its answer must not stay alive while the thread waits for the next one.
            del job
            with self._lock:
                self._outstanding -= 1
        with self._lock:
            self._threads -= 1
            last = self._last if self._threads == 0 else None
        if last:
            last.make()
