"""Keeping chunks that a worker's forward has completed, off the engine's way.

The engine's thread only copies whole pages. Sorting them into rows, coding and writing happen on one
background thread; what does not fit into its backlog is not saved, and is counted.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from droidspeak.connector import Connector
from droidspeak.integrations.vllm_connector.loading import Loading
from droidspeak.integrations.vllm_connector.messages import SaveOrder
from droidspeak.integrations.vllm_connector.paging import PagedLayer
from droidspeak.integrations.vllm_connector.tables import BlockTable, live_from
from droidspeak.storage.tier import TierQueue

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
    table: BlockTable

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
class _Pages:
    """Copied pages of one layer, or of E; the first one begins with the token `start`."""

    copy: Tensor
    start: int

    def rows(self, begin: int, size: int) -> slice:
        """Among the rows of these pages, those of `size` tokens from `begin` on."""
        return slice(begin - self.start, begin - self.start + size)


@dataclass(frozen=True)
class _Copied:
    """Pages of some chunks."""

    order: SaveOrder
    layers: Mapping[int, _Pages]
    e: _Pages | None

    @property
    def nbytes(self) -> int:
        pages = [*self.layers.values(), *([] if self.e is None else [self.e])]
        return sum(one.copy.nbytes for one in pages)


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
        backlog: int,
    ) -> None:
        self._connector, self._layers, self._e = connector, layers, e
        self._backlog = backlog
        self._lock = threading.Lock()
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, "droidspeak-vllm-save")

    def loading(self, loading: Loading) -> None:
        """K and V are about to be loaded. E is not: chunks over these tokens are not saved with E."""
        if self._e is not None:
            self._e.clear(loading.blocks(self._e.table))

    def keep(self, order: SaveOrder) -> None:
        """Copies the pages of `order`; everything else happens later.

        Chunks with tokens that a layer has let go already, behind its window, are not saved.
        """
        order = self._still_there(order)
        if not order.chunks:
            return
        copied = self._copy(order)
        with self._lock:
            if self._waiting and self._waiting + copied.nbytes > self._backlog:
                self._connector.counters.add("chunks_dropped", amount=len(order.chunks))
                return
            self._waiting += copied.nbytes
        self._thread.submit(self._save, copied)

    @property
    def waiting(self) -> TierQueue:
        """Bytes of pages that wait, and of the chunks that were made of them."""
        return TierQueue(
            self._waiting + self._connector.saving,
            self._backlog + self._connector.options.save_backlog,
        )

    def close(self) -> None:
        """Waits for what is being saved."""
        self._thread.shutdown(wait=True)

    def _still_there(self, order: SaveOrder) -> SaveOrder:
        size = self._connector.options.chunk_size
        end = order.chunks.stop * size
        tables = {layer.table for layer in self._layers.values()}
        live = max(
            live_from(order.tables[table.index][: -(-end // table.block_size)], table.block_size)
            for table in tables
        )
        first = max(order.chunks.start, -(-live // size))
        return replace(order, chunks=range(first, order.chunks.stop))

    def _copy(self, order: SaveOrder) -> _Copied:
        blocks = {layer.table: self._blocks(order, layer.table) for layer in self._layers.values()}
        layers = {
            number: _Pages(layer.snapshot(ids).cpu(), start)
            for number, layer in self._layers.items()
            for ids, start in [blocks[layer.table]]
        }
        if self._e is None:
            return _Copied(order, layers, None)
        ids, start = self._blocks(order, self._e.table)
        return _Copied(order, layers, _Pages(self._e.snapshot(ids).cpu(), start))

    def _blocks(self, order: SaveOrder, table: BlockTable) -> tuple[Tensor, int]:
        """Blocks of a table that hold the chunks of `order`, and the token that they begin with."""
        size = self._connector.options.chunk_size
        first = order.chunks.start * size // table.block_size
        last = -(-order.chunks.stop * size // table.block_size)
        device = next(iter(self._layers.values())).device
        ids = torch.tensor(order.tables[table.index][first:last], dtype=torch.int64, device=device)
        return ids, first * table.block_size

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
        for layer, pages in copied.layers.items() if session.wanted else ():
            k, v = self._layers[layer].rows(pages.copy)
            e = self._captured(copied, layer) if layer in session.e_layers else None
            for begin in (chunk * size for chunk in order.chunks):
                rows = pages.rows(begin, size)
                session.put(layer, k[rows], v[rows], e(begin, size) if e else None, start=begin)
        session.finish()

    def _captured(self, copied: _Copied, layer: int) -> Callable[[int, int], Tensor | None] | None:
        """E of a layer: of so many tokens from one on, if a forward has written all of them."""
        if self._e is None or copied.e is None:
            return None
        pages, rows = copied.e, self._e.rows(copied.e.copy, layer)

        def written(begin: int, size: int) -> Tensor | None:
            e = rows[pages.rows(begin, size)]
            return None if bool(e.isnan().any()) else e

        return written
