"""Other processes that use a folder. A child is forked from a server that has the imports done, and runs one
function's source, so that it needs nothing of the test's module."""

from __future__ import annotations

import inspect
import multiprocessing
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

__all__ = ["running", "started", "stopped", "write_and_evict"]

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["droidspeak.storage.disk", "droidspeak.storage.testing"])


@contextmanager
def running(work: Callable[..., None], *arguments: object) -> Iterator[BaseProcess]:
    """A process that runs `work`; it is killed at the end, if it still runs."""
    code = f"{textwrap.dedent(inspect.getsource(work))}\n{work.__name__}(*arguments)"
    process = _FORKED.Process(target=exec, args=(code, {"arguments": arguments}))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def started(root: Path, first: int) -> None:
    """Waits until a process that writes from `first` on has opened the folder."""
    end = time.monotonic() + 60
    while not (root / f"started-{first}").exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def stopped(process: BaseProcess, root: Path, first: int) -> None:
    """Tells a process that writes from `first` on to end, and waits until it has."""
    (root / f"stop-{first}").touch()
    process.join(60)
    assert process.exitcode == 0


def write_and_evict(root, first, last, capacity):
    """Writes, reads and deletes the chunks of these seeds until it is told to end, or killed."""
    from droidspeak.storage.disk import DiskTier
    from droidspeak.storage.testing import make_chunk, make_key

    with DiskTier(root, capacity=capacity, min_free=0) as tier:
        (root / f"started-{first}").touch()
        while not (root / f"stop-{first}").exists():
            for seed in range(first, last):
                tier.write(make_chunk(seed))
                tier.read(make_key(seed))
                if seed % 3 == 0 and seed > first:
                    tier.delete(make_key(seed - 1))
