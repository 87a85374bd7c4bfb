"""Put + exists and get through LMCache's own connector, as its engine calls it.

    python -m benchmarks.server.lmcacheclient ROUNDS NAME=PORT ...

Prints JSON: seconds by server, operation and size. A process of its own, since LMCache is loaded.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import threading
import time
from typing import Any

__all__ = ["main"]

_SIZES = (256 << 10, 1 << 20, 4 << 20)
_CALLS = 12


def main(rounds: int, ports: dict[str, int]) -> None:
    """Measures all servers in turn."""
    os.environ["LMCACHE_TRACK_USAGE"] = "false"
    os.environ["LMCACHE_LOG_LEVEL"] = "ERROR"
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    backend = _backend()
    connectors = {name: _connector(port, loop, backend) for name, port in ports.items()}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in ports}
    for turn in range(rounds + 1):
        for size in _SIZES:
            for name in random.Random(f"{turn} {size}").sample(list(connectors), len(connectors)):
                for operation, seconds in _calls(connectors[name], loop, backend, size).items():
                    if turn:
                        found[name].setdefault(f"{operation} {size}", []).extend(seconds)
    print(json.dumps(found))
    os._exit(0)  # LMCache leaves threads behind


def _backend() -> Any:
    import torch
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

    config = LMCacheEngineConfig.from_defaults(local_cpu=False, max_local_cpu_size=0.5, chunk_size=256)
    metadata = LMCacheMetadata(
        model_name="bench/model",
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(4, 2, 256, 2, 64),
        chunk_size=256,
    )
    return LocalCPUBackend(config, metadata)


def _connector(port: int, loop: asyncio.AbstractEventLoop, backend: Any) -> Any:
    from lmcache.v1.storage_backend.connector.lm_connector import LMCServerConnector

    return LMCServerConnector("127.0.0.1", port, loop, backend)


def _calls(
    connector: Any, loop: asyncio.AbstractEventLoop, backend: Any, size: int
) -> dict[str, list[float]]:
    import torch
    from lmcache.utils import CacheEngineKey
    from lmcache.v1.memory_management import MemoryFormat

    shape = torch.Size([size // 256, 2, 64])
    written = backend.allocate(shape, torch.bfloat16, MemoryFormat.KV_T2D)
    puts, gets = [], []
    for number in range(_CALLS):
        key = CacheEngineKey("bench/model", 1, 0, size << 8 | number, torch.bfloat16)
        start = time.perf_counter()
        _run(connector.put(key, written), loop)
        assert connector.exists_sync(key)
        puts.append(time.perf_counter() - start)
        start = time.perf_counter()
        got = _run(connector.get(key), loop)
        gets.append(time.perf_counter() - start)
        got.ref_count_down()
    written.ref_count_down()
    return {"put + exists": puts, "get": gets}


def _run(call: Any, loop: asyncio.AbstractEventLoop) -> Any:
    return asyncio.run_coroutine_threadsafe(call, loop).result(120)


if __name__ == "__main__":
    main(
        int(sys.argv[1]),
        {name: int(port) for name, _, port in (word.partition("=") for word in sys.argv[2:])},
    )
