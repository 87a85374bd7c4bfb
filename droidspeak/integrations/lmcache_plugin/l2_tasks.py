"""Tasks of LMCache's L2 interface: submitted, done by a few threads, told by an event descriptor.

    submit -> jobs on the pool -> finished -> the result can be fetched once, and the descriptor wakes
              whoever polls

Nothing here blocks the submitter. A job may answer with something to wait for; that is done on a thread
of its own, and the task ends after it. `close` lets the jobs under way end; those that have not begun
never will, and their tasks end without them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Generic, TypeVar

from lmcache.v1.platform import create_event_notifier

__all__ = ["TaskQueue", "Wait"]

_log = logging.getLogger(__name__)
_CLOSE_SECONDS = 60.0
R = TypeVar("R")
Wait = Callable[[], None]
Job = Callable[[], Wait | None]


class TaskQueue(Generic[R]):
    """Tasks of one kind, with results of type `R`.

    Args:
        name: of the kind; it is part of the thread names.
        workers: threads at most; they are started when they are needed.
        ids: task ids of all kinds of one adapter.
    """

    def __init__(self, name: str, workers: int, ids: count[int]) -> None:
        self._ids = ids
        self._pool = ThreadPoolExecutor(workers, f"droidspeak-l2-{name}")
        self._event = create_event_notifier()
        self._mutex = threading.Condition()
        self._results: dict[int, R] = {}
        self._open = 0
        self._closed = False

    def fileno(self) -> int:
        """The descriptor that becomes readable when a task is finished."""
        return int(self._event.fileno())

    @property
    def in_flight(self) -> int:
        """Tasks that are not finished."""
        return self._open

    def submit(self, jobs: Sequence[Job], result: Callable[[], R]) -> int:
        """Starts a task; its id.

        Args:
            jobs: done in any order, some at the same time.
            result: called once, when all jobs have ended.
        """
        task = next(self._ids)
        with self._mutex:
            self._open += 1
        left = _Countdown(max(len(jobs), 1), lambda: self._finish(task, result()))
        for job in jobs or [_nothing]:
            self.run(job).add_done_callback(left.done)
        return task

    def run(self, job: Job) -> Future[Wait | None]:
        """Does `job` on the pool. An error is a bug: it is logged with its traceback."""
        future = self._pool.submit(job)
        future.add_done_callback(_tell)
        return future

    def fetch(self, task: int) -> R | None:
        """The result of `task`, once; `None` while it is not finished."""
        with self._mutex:
            return self._results.pop(task, None)

    def fetch_all(self) -> dict[int, R]:
        """Results of all tasks that are finished and were not fetched."""
        with self._mutex:
            results, self._results = self._results, {}
        return results

    def close(self) -> None:
        """Waits for the jobs under way, and a while for what they wait for. Twice is fine."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._mutex:
            if not self._mutex.wait_for(lambda: self._open == 0, _CLOSE_SECONDS):
                _log.warning("closed before %d L2 tasks had ended", self._open)
            self._closed = True
            self._event.close()

    def _finish(self, task: int, result: R) -> None:
        with self._mutex:
            self._results[task] = result
            self._open -= 1
            self._mutex.notify_all()
            if not self._closed:
                self._event.notify()


class _Countdown:
    """Calls `end` when all steps have been taken, on the thread of the last."""

    def __init__(self, steps: int, end: Callable[[], None]) -> None:
        self._left, self._end = steps, end
        self._mutex = threading.Lock()

    def done(self, job: Future[Wait | None]) -> None:
        wait = None if job.cancelled() or job.exception() else job.result()
        if wait is None:
            self._step()
        else:
            threading.Thread(target=self._after, args=(wait,), name="droidspeak-l2-late", daemon=True).start()

    def _after(self, wait: Wait) -> None:
        wait()
        self._step()

    def _step(self) -> None:
        with self._mutex:
            self._left -= 1
            last = self._left == 0
        if last:
            self._end()


def _nothing() -> None:
    """The job of a task without any."""


def _tell(future: Future[Wait | None]) -> None:
    if not future.cancelled() and (error := future.exception()):
        _log.error("an L2 job failed", exc_info=error)
