"""Who measures the tasks of a profile: this process, several processes, or the actors of a Ray cluster.

Each worker loads both models once, then measures one prefix at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from droidspeak.errors import DroidSpeakError, MissingExtra, UsageError
from droidspeak.integrations.transformers.evaluate import Bench, BenchSpec
from droidspeak.layerselect.journal import Runner
from droidspeak.layerselect.tasks import Result, Task

__all__ = ["workers"]

_bench: Bench | None = None


@contextmanager
def workers(spec: BenchSpec, count: int, ray_address: str | None) -> Iterator[Runner]:
    """A runner over `count` workers; they are gone when the block ends.

    Args:
        ray_address: a cluster's address, or `"local"` for a Ray of this machine alone.

    Raises:
        MissingExtra: Ray is asked for and not installed.
        UsageError: no cluster at that address.
    """
    if ray_address is not None:
        with _on_ray(spec, count, ray_address) as runner:
            yield runner
    elif count == 1:
        yield _here(Bench(spec))
    else:
        with _in_processes(spec, count) as runner:
            yield runner


def _here(bench: Bench) -> Runner:
    def run(tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
        with torch.no_grad():
            yield from ((task, bench.run(task)) for task in tasks)

    return run


@contextmanager
def _in_processes(spec: BenchSpec, count: int) -> Iterator[Runner]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(spec,))

    def run(tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
        futures = {pool.submit(_measure, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise DroidSpeakError(
                "a worker process has died (out of memory?); the same command goes on from what is done"
            ) from None

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


def _start(spec: BenchSpec) -> None:
    """In a worker process: Ctrl-C is for the parent, which tells the workers to stop."""
    global _bench  # noqa: PLW0603 - what a pool's initializer makes can be kept nowhere else
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_grad_enabled(False)
    _bench = Bench(spec)


def _measure(task: Task) -> Result:
    assert _bench is not None
    return _bench.run(task)


class _Actor:
    """One worker of a Ray cluster."""

    def __init__(self, spec: BenchSpec) -> None:
        torch.set_grad_enabled(False)
        self._bench = Bench(spec)

    def run(self, task: Task) -> Result:
        return self._bench.run(task)


@contextmanager
def _on_ray(spec: BenchSpec, count: int, address: str) -> Iterator[Runner]:
    ray = _import_ray()
    try:
        ray.init(address=None if address == "local" else address, num_cpus=_cpus(count, address), **_QUIET)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"no Ray cluster at {address!r}: {str(error).splitlines()[0]}") from None
    try:
        gpus = 0 if spec.device == "cpu" else 1
        actors = [ray.remote(num_gpus=gpus)(_Actor).remote(spec) for _ in range(count)]
        yield _over(ray, actors)
    finally:
        ray.shutdown()


_QUIET: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}


def _cpus(count: int, address: str) -> int | None:
    """A local Ray runs as many actors as were asked for; a cluster knows its own processors."""
    return max(count, os.cpu_count() or 1) if address == "local" else None


def _over(ray: Any, actors: Sequence[Any]) -> Runner:
    def run(tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
        waiting = list(reversed(tasks))
        running: dict[Any, tuple[Any, Task]] = {}
        idle = list(actors)
        while waiting or running:
            while waiting and idle:
                actor, task = idle.pop(), waiting.pop()
                running[actor.run.remote(task)] = actor, task
            (done,), _ = ray.wait(list(running))
            actor, task = running.pop(done)
            idle.append(actor)
            yield task, _get(ray, done)

    return run


def _get(ray: Any, reference: Any) -> Result:
    try:
        result: Result = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DroidSpeakError):
            raise error.cause from None
        raise
    return result


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingExtra("--ray", "ray") from None
    return ray
