"""Keeping chunks that a worker's forward has completed, off the engine's way.

The engine's thread only copies whole pages. Sorting them into rows, coding and writing happen on one
background thread; what does not fit into its backlog is not saved, and is counted.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from droidspeak.connector import Connector
from droidspeak.integrations.vllm_connector.messages import SaveOrder
from droidspeak.integrations.vllm_connector.paging import PagedLayer

__all__ = ["EPages", "Saver"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EPages:
    """The pages of captured E: `[blocks, captured, block_size, hidden]`, and which layers they are of."""

    pages: Tensor
    layers: tuple[int, ...]

    def snapshot(self, block_ids: Tensor) -> Tensor:
        """A copy of whole pages."""
        return self.pages[block_ids]

    def rows(self, snapshot: Tensor, layer: int) -> Tensor:
        """E of one layer, `[blocks x block_size, hidden]`."""
        return snapshot[:, self.layers.index(layer)].flatten(0, 1)


@dataclass(frozen=True)
class _Copied:
    """Pages of some chunks.

    Attributes:
        start: the token that the first page begins with.
    """

    order: SaveOrder
    start: int
    layers: Mapping[int, Tensor]
    e: Tensor | None

    @property
    def nbytes(self) -> int:
        tensors = [*self.layers.values(), *([] if self.e is None else [self.e])]
        return sum(tensor.nbytes for tensor in tensors)


class Saver:
    """Saves for one worker.

    Args:
        layers: where K and V are read.
        e: where E is read; `None` if none is captured, and chunks are saved without.
        backlog: bytes of pages that may wait.
    """

    def __init__(
        self,
        connector: Connector,
        layers: Mapping[int, PagedLayer],
        e: EPages | None,
        *,
        block_size: int,
        backlog: int = 1 << 30,
    ) -> None:
        self._connector, self._layers, self._e = connector, layers, e
        self._block_size, self._backlog = block_size, backlog
        self._lock = threading.Lock()
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, "droidspeak-vllm-save")

    def keep(self, order: SaveOrder) -> None:
        """Copies the pages of `order`; everything else happens later."""
        copied = self._copy(order)
        with self._lock:
            if self._waiting and self._waiting + copied.nbytes > self._backlog:
                self._connector.counters.add("chunks_dropped", amount=len(order.chunks))
                return
            self._waiting += copied.nbytes
        self._thread.submit(self._save, copied)

    def close(self) -> None:
        """Waits for what is being saved."""
        self._thread.shutdown(wait=True)

    def _copy(self, order: SaveOrder) -> _Copied:
        size = self._connector.options.chunk_size
        first = order.chunks.start * size // self._block_size
        last = -(-order.chunks.stop * size // self._block_size)
        device = next(iter(self._layers.values())).device
        blocks = torch.tensor(order.block_ids[first:last], dtype=torch.int64, device=device)
        return _Copied(
            order,
            first * self._block_size,
            {layer: pages.snapshot(blocks).cpu() for layer, pages in self._layers.items()},
            None if self._e is None else self._e.snapshot(blocks).cpu(),
        )

    def _save(self, copied: _Copied) -> None:
        try:
            self._put(copied)
        except BaseException:  # noqa: BLE001 - saving never fails a request, and this thread must go on
            _log.exception("chunks of request %s not saved", copied.order.request_id)
        finally:
            with self._lock:
                self._waiting -= copied.nbytes

    def _put(self, copied: _Copied) -> None:
        order, size = copied.order, self._connector.options.chunk_size
        given: Collection[int] = () if self._e is None else self._e.layers
        tokens = order.token_ids[: order.chunks.stop * size]
        session = self._connector.save(tokens, order.source, salt=order.salt, e_layers=given)
        if session.wanted:
            begin = order.chunks.start * size
            for layer, snapshot in copied.layers.items():
                k, v = self._layers[layer].rows(snapshot)
                e = None
                if layer in session.e_layers and self._e is not None and copied.e is not None:
                    e = self._e.rows(copied.e, layer)[begin - copied.start :]
                session.put(layer, k[begin - copied.start :], v[begin - copied.start :], e, start=begin)
        session.finish()
