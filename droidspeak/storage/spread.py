"""Many calls side by side, over items of which nobody knows how many there are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["spread"]

_AHEAD = 4

T = TypeVar("T")
U = TypeVar("U")


def spread(
    call: Callable[[T], U],
    items: Iterable[T],
    threads: int,
    stop: Callable[[], None] = lambda: None,
) -> Generator[U, None, None]:
    """`call` of each item, in order, on so many threads; few items are taken before they are needed.

    Whoever stops early (an error of `call`, a Ctrl-C) waits for the calls under way, and no more are made.

    Args:
        stop: called at the end, before the calls under way are waited for.
    """
    pending: deque[Future[U]] = deque()
    with ThreadPoolExecutor(threads, "droidspeak-spread") as pool:
        try:
            for item in items:
                pending.append(pool.submit(call, item))
                if len(pending) >= _AHEAD * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            stop()
            for future in pending:
                future.cancel()
            # An error's traceback keeps this frame, which must not keep the error.
            pending.clear()
