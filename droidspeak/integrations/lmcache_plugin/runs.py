"""LMCache asks for lists of keys and can use only how many of them come off, from the first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from droidspeak.integrations.lmcache_plugin.objects import layer_of
from droidspeak.storage import ChunkKey

__all__ = ["Run", "leading", "runs_of"]

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Run:
    """Neighbouring keys of one chunk: one key (`layers` is `None`), or some of its layers."""

    chunk: ChunkKey
    layers: tuple[int, ...] | None

    @property
    def keys(self) -> int:
        return len(self.places)

    @property
    def places(self) -> Sequence[int]:
        """Of its memory objects, among those of the chunk."""
        return (0,) if self.layers is None else self.layers


def runs_of(keys: Iterable[Any], chunk_key: Callable[[Any], ChunkKey]) -> list[Run]:
    """LMCache keys by chunk, in their order."""
    named = [(chunk_key(key), layer_of(key)) for key in keys]
    runs = []
    for chunk, group in groupby(named, key=lambda pair: pair[0]):
        layers = tuple(layer for _, layer in group if layer is not None)
        runs.append(Run(chunk, layers or None))
    return runs


def leading(
    pool: Executor, work: Callable[[T], R | None], items: Sequence[T], undo: Callable[[T, R], object]
) -> list[R]:
    """What `work` gives for `items`, until the first `None`; some at one time, in order.

    Args:
        undo: what becomes of an item behind the first `None` that had been worked on already.
    """
    failed = threading.Event()

    def unless_failed(item: T) -> R | None:
        got = None if failed.is_set() else work(item)
        if got is None:
            failed.set()
        return got

    # A thread hop costs more than the memory hit that a single item usually is.
    results = list(pool.map(unless_failed, items) if len(items) > 1 else map(work, items))
    good: list[R] = []
    cut = False
    for item, result in zip(items, results, strict=True):
        cut = cut or result is None
        if result is None:
            continue
        if cut:
            undo(item, result)
        else:
            good.append(result)
    return good
