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
from typing import Any

import torch
from torch import Tensor

from droidspeak.connector import Connector
from droidspeak.integrations.vllm_connector.messages import SaveOrder
from droidspeak.integrations.vllm_connector.paging import PagedLayer

__all__ = ["EPages", "Saver", "captured_layers"]

_log = logging.getLogger(__name__)


def captured_layers(vllm_config: Any) -> tuple[int, ...]:
    """Layers whose E an engine captures, as vLLM's method `extract_hidden_states` is told."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "extract_hidden_states":
        return ()
    return tuple(speculative.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids)


@dataclass(frozen=True)
class EPages:
    """The pages of captured E: `[blocks, captured, block_size, hidden]`, and which layers they are of."""

    pages: Tensor
    layers: tuple[int, ...]

    def snapshot(self, block_ids: Tensor) -> Tensor:
        """A copy of whole pages."""
        return self.pages[block_ids]

    def clear(self, block_ids: Tensor) -> None:
        """Marks pages as nobody's: their rows are no numbers until a forward writes them."""
        self.pages[block_ids] = torch.nan

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
        backlog: int,
    ) -> None:
        self._connector, self._layers, self._e = connector, layers, e
        self._block_size, self._backlog = block_size, backlog
        self._lock = threading.Lock()
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, "droidspeak-vllm-save")

    def loading(self, block_ids: Tensor) -> None:
        """K and V are about to be loaded into blocks. E is not: chunks over them are not saved with E."""
        if self._e is not None:
            self._e.clear(block_ids)

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
        for layer, snapshot in copied.layers.items() if session.wanted else ():
            k, v = self._layers[layer].rows(snapshot)
            e = None
            if layer in session.e_layers and self._e is not None and copied.e is not None:
                e = self._e.rows(copied.e, layer)
            for begin in (chunk * size for chunk in order.chunks):
                cut = slice(begin - copied.start, begin - copied.start + size)
                session.put(layer, k[cut], v[cut], _written(e, cut), start=begin)
        session.finish()


def _written(e: Tensor | None, rows: slice) -> Tensor | None:
    """These rows of E, if a forward has written all of them."""
    return None if e is None or bool(e[rows].isnan().any()) else e[rows]
