"""What LMCache lacks inside vLLM on the CPU: something that moves KV between its memory and vLLM's pages.

LMCache 0.5.6 has such "GPU connectors" for accelerators only. `LMCacheOnCpu` is vLLM's `LMCacheConnectorV1`
with `Pages` put where LMCache makes its own; all else is LMCache's. vLLM loads it by
`kv_connector_module_path`.

LMCache is imported late, as vLLM does it: it imports numba, and vLLM 0.32's start on the CPU, which looks at
every module's attributes, ends with an error if numba is there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector import LMCacheConnectorV1

__all__ = ["LMCacheOnCpu"]


class LMCacheOnCpu(LMCacheConnectorV1):  # type: ignore[misc]
    """LMCache in the engine's process, on the CPU."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        import lmcache.v1.gpu_connector as making

        making.CreateGPUConnector = _pages
        super().__init__(*arguments, **options)


def _pages(_config: Any, metadata: Any, *_arguments: Any, **_options: Any) -> Any:
    """LMCache's `CreateGPUConnector`."""
    from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface

    class Pages(GPUConnectorInterface):  # type: ignore[misc]
        """Copies vLLM's pages whole: a memory object holds `[layers, pages, *page]`, in vLLM's own order.

        A page is contiguous in both places, so that nothing is sorted and a copy runs at the speed of memory.
        """

        def get_shape(self, num_tokens: int) -> torch.Size:
            shape: torch.Size = metadata.get_shapes(num_tokens)[0]
            return shape

        def from_gpu(self, memory_obj: Any, start: int, end: int, **given: Any) -> None:
            for pages, places, rows in _matched(memory_obj, start, end, **given):
                torch.index_select(pages, 0, places, out=rows)

        def to_gpu(self, memory_obj: Any, start: int, end: int, **given: Any) -> None:
            for pages, places, rows in _matched(memory_obj, start, end, **given):
                pages.index_copy_(0, places, rows)

        def batched_from_gpu(
            self, memory_objs: Sequence[Any], starts: Sequence[int], ends: Sequence[int], **given: Any
        ) -> None:
            for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
                self.from_gpu(memory_obj, start, end, **given)

        def batched_to_gpu(
            self, memory_objs: Sequence[Any], starts: Sequence[int], ends: Sequence[int], **given: Any
        ) -> None:
            for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
                self.to_gpu(memory_obj, start, end, **given)

    return Pages()


def _matched(
    memory_obj: Any, start: int, end: int, *, kvcaches: Sequence[Tensor], slot_mapping: Tensor, **_given: Any
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per layer: its pages, `[blocks, kv_heads, block_size, content]`; which of them; and their content."""
    size = kvcaches[0].shape[2]
    places = slot_mapping[start:end:size] // size
    rows = memory_obj.tensor.view(len(kvcaches), len(places), *kvcaches[0].shape[1:])
    return [(pages, places, rows[layer]) for layer, pages in enumerate(kvcaches)]
