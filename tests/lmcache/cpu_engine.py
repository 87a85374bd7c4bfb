"""The real LMCache engine without a GPU: a paged KV cache in host memory, and connectors that copy.

Runs in a process of its own: LMCache sets the start method of `multiprocessing` and leaves threads behind.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from lmcache.utils import mock_up_broadcast_fn, mock_up_broadcast_object_fn
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.config import load_engine_config_with_overrides
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface, VLLMPagedMemLayerwiseGPUConnector
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata

HEADS, WIDTH, SLOTS = 2, 32, 1024
LAYERS = 4


class WholeChunks(GPUConnectorInterface):
    """Memory objects `[2, layers, tokens, heads * width]`."""

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def get_shape(self, num_tokens):
        return torch.Size([2, self.layers, num_tokens, HEADS * WIDTH])

    def from_gpu(self, memory_obj, start, end, **kwargs):
        slots = kwargs["slot_mapping"][start:end]
        for layer, kv in enumerate(kwargs["kvcaches"]):
            memory_obj.tensor[:, layer] = kv[:, slots].reshape(2, end - start, -1)

    def to_gpu(self, memory_obj, start, end, **kwargs):
        assert memory_obj.metadata.fmt == MemoryFormat.KV_2LTD
        slots = kwargs["slot_mapping"][start:end]
        for layer, kv in enumerate(kwargs["kvcaches"]):
            kv[:, slots] = memory_obj.tensor[:, layer].reshape(2, end - start, HEADS, WIDTH)

    def batched_from_gpu(self, memory_objs, starts, ends, **kwargs):
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(memory_obj, start, end, **kwargs)

    def batched_to_gpu(self, memory_objs, starts, ends, **kwargs):
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(memory_obj, start, end, **kwargs)


class Layers(VLLMPagedMemLayerwiseGPUConnector):
    """Memory objects `[tokens, 2, heads * width]`; LMCache accepts only subclasses of its own connectors."""

    def __init__(self, layers: int) -> None:  # without the base's: it needs a CUDA stream
        self.num_layers, self.hidden_dim_size, self.use_mla = layers, HEADS * WIDTH, False

    def batched_to_gpu(self, starts, ends, **kwargs):
        for layer in range(self.num_layers):
            memory_objs = yield
            # Not strict, as in LMCache: what is missing at the end of the list is not noticed.
            for start, end, memory_obj in zip(starts, ends, memory_objs, strict=False):
                assert memory_obj.metadata.fmt == MemoryFormat.KV_T2D
                rows = memory_obj.tensor.transpose(0, 1).reshape(2, end - start, HEADS, WIDTH)
                kwargs["kvcaches"][layer][:, kwargs["slot_mapping"][start:end]] = rows
        yield
        yield

    def batched_from_gpu(self, memory_objs, starts, ends, **kwargs):
        for layer in range(self.num_layers):
            for start, end, memory_obj in zip(starts, ends, memory_objs[layer], strict=True):
                rows = kwargs["kvcaches"][layer][:, kwargs["slot_mapping"][start:end]]
                memory_obj.tensor.copy_(rows.reshape(2, end - start, -1).transpose(0, 1))
            yield
        yield


@dataclass
class Engine:
    """An engine of one model. `instance` names it: LMCache keeps engines by name."""

    config_file: str
    model: str = "org/model"
    layers: int = LAYERS
    instance: str = "test"
    overrides: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = load_engine_config_with_overrides(
            config_file_path=self.config_file, overrides=self.overrides
        )
        self.chunk_size = config.chunk_size
        metadata = LMCacheMetadata(
            model_name=self.model,
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(self.layers, 2, config.chunk_size, HEADS, WIDTH),
            chunk_size=config.chunk_size,
        )
        connector = (Layers if config.use_layerwise else WholeChunks)(self.layers)
        self.layerwise = config.use_layerwise
        self.engine = LMCacheEngineBuilder.get_or_create(
            self.instance, config, metadata, connector, mock_up_broadcast_fn, mock_up_broadcast_object_fn
        )
        self.engine.post_init()

    @property
    def backends(self):
        return self.engine.storage_manager.storage_backends

    @property
    def plugin(self):
        """Ours: the storage plug-in, or the connector in LMCache's remote backend."""
        if "droidspeak" in self.backends:
            return self.backends["droidspeak"]
        return self.backends["RemoteBackend-droidspeak"].connection.getWrappedConnector()

    def kv(self, seed: int | None = None):
        """KV caches of all layers, random by `seed` or empty."""
        if seed is None:
            return [torch.zeros(2, SLOTS, HEADS, WIDTH, dtype=torch.bfloat16) for _ in range(self.layers)]
        source = torch.Generator().manual_seed(seed)
        return [torch.randn(2, SLOTS, HEADS, WIDTH, generator=source).bfloat16() for _ in range(self.layers)]

    def store(self, tokens, kv) -> None:
        slots = torch.arange(len(tokens))
        if not self.layerwise:
            self.engine.store(tokens, kvcaches=kv, slot_mapping=slots, req_id="store")
            return
        storing = self.engine.store_layer(tokens, kvcaches=kv, slot_mapping=slots, sync=True, req_id="store")
        for _ in range(self.layers + 1):
            next(storing)

    def retrieve(self, tokens, kv, request: str = "retrieve") -> int:
        """Loads into `kv`; how many tokens the engine says it has loaded."""
        slots = torch.arange(len(tokens))
        if not self.layerwise:
            mask = self.engine.retrieve(tokens, kvcaches=kv, slot_mapping=slots, req_id=request)
            return int(mask.sum())
        mask = None
        for mask in self.engine.retrieve_layer(  # noqa: B007 - the last one counts
            tokens, kvcaches=kv, slot_mapping=slots, sync=True, req_id=request
        ):
            pass
        return int(mask.sum())

    def lookup(self, tokens, request: str | None = None) -> int:
        """How many tokens are there; pinned if `request` names the lookup."""
        return self.engine.lookup(tokens, lookup_id=request, pin=request is not None)

    def free_bytes(self) -> int:
        allocator = self.backends["LocalCPUBackend"].get_memory_allocator().pin_allocator
        return allocator.address_manager.get_free_size()

    def close(self) -> None:
        LMCacheEngineBuilder.destroy(self.instance)

    @staticmethod
    def close_all() -> None:
        for instance in list(LMCacheEngineBuilder._instances):
            LMCacheEngineBuilder.destroy(instance)


def tokens_of(count: int, seed: int = 0):
    return torch.randint(0, 30_000, (count,), generator=torch.Generator().manual_seed(seed))


def same(kv, other, count: int) -> bool:
    return all(torch.equal(a[:, :count], b[:, :count]) for a, b in zip(kv, other, strict=True))


def leave(status: int = 0) -> None:
    """Ends the process: LMCache's threads would keep it."""
    os._exit(status)
