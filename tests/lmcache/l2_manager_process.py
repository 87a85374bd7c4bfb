"""A process with LMCache's StorageManager and our L2 adapter, driven by lines on its standard input.

    store FIRST COUNT SALT       writes objects into L1 and waits until L2 has them     -> {"stored": n}
    clear                        empties L1                                             -> {"l1": bytes}
    fetch FIRST COUNT SALT       prefetches; compares what came, bit for bit
                                 -> {"bits": [...], "from_l2": n, "exact": bool}
    chunks FIRST COUNT SALT      where the objects are kept                -> {"chunks": [prefix, ...]}
    status                       the adapter's own status

What an object holds follows from its key alone, so another process knows it too.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings

import torch

warnings.simplefilter("ignore")

from lmcache.v1.distributed.api import (  # noqa: E402
    GroupedObjectKeys,
    MemoryLayoutDesc,
    ObjectKey,
    PrefetchTaskSpec,
)
from lmcache.v1.distributed.config import get_arg_parser, parse_args_to_config  # noqa: E402
from lmcache.v1.distributed.storage_manager import StorageManager  # noqa: E402

from droidspeak.integrations.lmcache_plugin.l2_objects import chunk_key  # noqa: E402

SHAPE = (2, 4, 64, 128)
LAYOUT = MemoryLayoutDesc([torch.Size(SHAPE)], [torch.bfloat16])
SECONDS = 60.0


def keys_of(first: str, count: str, salt: str = "") -> list[ObjectKey]:
    numbers = range(int(first), int(first) + int(count))
    return [ObjectKey(n.to_bytes(32, "big"), "org/model", 0x01000100, 0, salt) for n in numbers]


def content_of(key: ObjectKey) -> torch.Tensor:
    seed = int.from_bytes(key.chunk_hash[-4:], "big") + 1000 * len(key.cache_salt)
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def wait_for(condition) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


class Commands:
    def __init__(self, adapter: str) -> None:
        parser = get_arg_parser()
        args = [
            "--l1-size-gb",
            "0.25",
            "--eviction-policy",
            "LRU",
            "--no-l1-use-lazy",
            "--l2-adapter",
            adapter,
        ]
        self.manager = StorageManager(parse_args_to_config(parser.parse_args(args)))
        ((_, self.adapter),) = self.manager.l2_adapters()

    def store(self, *which: str) -> dict:
        keys = keys_of(*which)
        reserved = self.manager.reserve_write(keys, LAYOUT)
        assert len(reserved) == len(keys)
        for key, obj in reserved.items():
            obj.tensor.copy_(content_of(key))
        before = self._stored()
        self.manager.finish_write(keys)
        wait_for(lambda: self._stored() - before == len(keys))
        return {"stored": len(keys)}

    def _stored(self) -> int:
        counts = self.adapter.report_status()["counters"]
        return sum(counts.get("stored", {}).values())

    def clear(self) -> dict:
        def emptied() -> bool:
            self.manager.clear()
            return self.manager.get_l1_usage()[0] == 0

        wait_for(emptied)
        return {"l1": 0}

    def fetch(self, *which: str) -> dict:
        keys = keys_of(*which)
        task = self.manager.submit_prefetch_task(PrefetchTaskSpec([GroupedObjectKeys(keys, 0, LAYOUT)]))
        assert self.manager.wait_prefetch_status(task, SECONDS)
        result = self.manager.query_prefetch_status(task)
        bits = [result.hit_cells[0].test(n) for n in range(len(keys))]
        hits = [key for key, bit in zip(keys, bits, strict=True) if bit]
        exact = True
        if hits:
            with self.manager.read_prefetched_results(hits) as objects:
                exact = all(
                    torch.equal(obj.tensor.view(torch.uint8), content_of(key).view(torch.uint8))
                    for key, obj in zip(hits, objects, strict=True)
                )
            self.manager.finish_read_prefetched(hits)
        return {"bits": bits, "from_l2": result.l2_hit_count, "exact": exact}

    def chunks(self, *which: str) -> dict:
        return {"chunks": [chunk_key(key).prefix for key in keys_of(*which)]}

    def status(self) -> dict:
        return {
            **self.adapter.report_status(),
            "manager_is_healthy": self.manager.report_status()["is_healthy"],
        }


def main() -> None:
    commands = Commands(sys.argv[1])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        name, *words = line.split()
        print(json.dumps(getattr(commands, name)(*words)), flush=True)
    commands.manager.close()
    print(json.dumps({"closed": True}), flush=True)
    os._exit(0)  # LMCache leaves threads that are no daemons


main()
