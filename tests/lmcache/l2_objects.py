"""LMCache's own keys, memory objects and waiting, for tests of the L2 adapter."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

os.environ["LMCACHE_TRACK_USAGE"] = "false"
os.environ["LMCACHE_DISABLE_BANNER"] = "1"
os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what LMCache imports
    from lmcache.v1.distributed.api import ObjectKey
    from lmcache.v1.distributed.l2_adapters import create_l2_adapter
    from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
    from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey, RegisterEngineDrivenContextPayload
    from lmcache.v1.multiprocess.transport.factory import RequestClientFactory
    from lmcache.v1.multiprocess.transport.zmq_impl import client as _client  # noqa: F401 - it warns too
    from lmcache.v1.platform import consume_fd

    from droidspeak.integrations.lmcache_plugin.l2 import DroidSpeakL2Adapter, DroidSpeakL2AdapterConfig
    from droidspeak.integrations.lmcache_plugin.l2_objects import Layout, chunk_key

__all__ = [
    "BF16",
    "SECONDS",
    "Driver",
    "DroidSpeakL2Adapter",
    "DroidSpeakL2AdapterConfig",
    "IPCCacheServerKey",
    "Layout",
    "ObjectKey",
    "RegisterEngineDrivenContextPayload",
    "RequestClientFactory",
    "chunk_files",
    "chunk_key",
    "content",
    "eventually",
    "key",
    "loaded",
    "memory_object",
    "opened",
]

BF16 = [(torch.bfloat16, (2, 4, 16, 32))]
SECONDS = 30.0


def key(
    index: int, *, salt: str = "", model: str = "org/model", rank: int = 0x01000100, group: int = 0
) -> ObjectKey:
    return ObjectKey(index.to_bytes(32, "big"), model, rank, group, salt)


def memory_object(
    parts: Sequence[tuple[torch.dtype, tuple[int, ...]]] = BF16, fill: int | None = None
) -> Any:
    """An object of `parts` as LMCache allocates it: a flat slice of a larger arena, random or filled."""
    size = sum(dtype.itemsize * prod(shape) for dtype, shape in parts)
    arena = torch.randint(0, 256, (size + 8192,), dtype=torch.uint8)
    if fill is not None:
        arena.fill_(fill)
    shapes, dtypes = [torch.Size(shape) for _, shape in parts], [dtype for dtype, _ in parts]
    metadata = MemoryObjMetadata(
        shape=shapes[0],
        dtype=dtypes[0],
        address=4096,
        phy_size=size,
        ref_count=1,
        fmt=MemoryFormat.KV_2LTD,
        shapes=shapes,
        dtypes=dtypes,
    )
    return TensorMemoryObj(arena[4096 : 4096 + size], metadata, parent_allocator=None)


def content(obj: Any) -> bytes:
    return bytes(memoryview(obj.byte_array).cast("B"))


def loaded(spec: dict[str, Any]) -> Any:
    """The adapter that LMCache makes of `--l2-adapter SPEC`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports all adapters that there are
        config = parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(spec)]))
        return create_l2_adapter(config.adapters[0])


@contextlib.contextmanager
def opened(*tiers: Any, **params: Any) -> Iterator[Driver]:
    """An adapter over `tiers`, and its driver; closed at the end."""
    config = DroidSpeakL2AdapterConfig.from_dict({"tiers": list(tiers), **params})
    adapter = DroidSpeakL2Adapter(config)
    try:
        yield Driver(adapter)
    finally:
        adapter.close()


class Driver:
    """Does what LMCache's controllers do: submits, polls the descriptor, fetches the result."""

    def __init__(self, adapter: DroidSpeakL2Adapter) -> None:
        self.adapter = adapter
        self._stored: dict[int, Any] = {}

    def store(self, keys: list[ObjectKey], objects: list[Any]) -> bool:
        return bool(self.end_store(self.adapter.submit_store_task(keys, objects)).is_successful())

    def end_store(self, task: int) -> Any:
        while task not in self._stored:
            self._wait(self.adapter.get_store_event_fd())
            self._stored |= self.adapter.pop_completed_store_tasks()
        return self._stored.pop(task)

    def lookup(self, keys: list[ObjectKey]) -> list[bool]:
        task = self.adapter.submit_lookup_and_lock_task(keys, {})
        return self._bits(len(keys), task, self.adapter.get_lookup_and_lock_event_fd(), "lookup_and_lock")

    def load(self, keys: list[ObjectKey], objects: list[Any]) -> list[bool]:
        return self.end_load(self.adapter.submit_load_task(keys, objects), len(keys))

    def end_load(self, task: int, count: int) -> list[bool]:
        return self._bits(count, task, self.adapter.get_load_event_fd(), "load")

    def unlock(self, keys: list[ObjectKey], left: int = 0) -> None:
        """Unlocks, and waits until `left` chunks are locked: LMCache is not told of an unlock's end."""
        self.adapter.submit_unlock(keys)
        assert eventually(lambda: self.adapter.report_status()["locks"] == left)

    def failures(self, what: str) -> dict[str, int]:
        """Counts by reason."""
        return dict(self.adapter.counters.snapshot().get(what, {}))

    def _bits(self, count: int, task: int, descriptor: int, kind: str) -> list[bool]:
        query = getattr(self.adapter, f"query_{kind}_result")
        while (bitmap := query(task)) is None:
            self._wait(descriptor)
        assert query(task) is None, "a result is given once"
        return [bitmap.test(index) for index in range(count)]

    def _wait(self, descriptor: int) -> None:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        assert poller.poll(SECONDS * 1000), "no event came"
        consume_fd(descriptor)


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether `condition` comes true within `SECONDS`."""
    end = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def chunk_files(root: Path) -> list[Path]:
    return sorted((root / "chunks").rglob("*.safetensors"))
