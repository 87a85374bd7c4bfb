"""Token-major rows in and out of vLLM's paged cache.

Rows are written by the attention backend itself, which knows its pages. They are read by a permutation that
is measured once: element numbers are written into a block through the backend, bit by bit, and where they
turn up is where that element lies. So no layout is written down here, and a backend that does not merely
move elements (a quantised cache, say) is found out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from droidspeak.errors import Incompatible
from droidspeak.integrations.vllm_connector.tables import NULL_BLOCK, BlockTable
from droidspeak.storage import Mismatch

__all__ = ["PagedLayer", "slots_of"]


def slots_of(block_ids: Tensor, start: int, end: int, block_size: int) -> Tensor:
    """Slots of the tokens `start .. end` of a request, `[end - start]`, int64."""
    positions = torch.arange(start, end, device=block_ids.device)
    return block_ids[positions // block_size] * block_size + positions % block_size


class PagedLayer:
    """The pages of one attention layer.

    Args:
        attention: vLLM's `Attention` module.
        pages: its cache, `[blocks, kv_heads, block_size, content]`.
        table: where blocks of a request are found.
        order: as `measure` found it on a layer of the same kind.

    Attributes:
        kind: layers of the same kind have the same order.
    """

    def __init__(self, attention: Any, pages: Tensor, table: BlockTable, order: Tensor | None = None) -> None:
        self.pages, self.table = pages, table
        self._attention, self._order = attention, order
        self._heads, self._width = attention.num_kv_heads, attention.head_size
        self.kind = table.block_size, self._heads, self._width

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self.pages.device

    @property
    def measured(self) -> bool:
        """Whether the order of its pages is known."""
        return self._order is not None

    def over(self, pages: Tensor) -> PagedLayer:
        """The same layer with other pages of the same kind."""
        return PagedLayer(self._attention, pages, self.table, self._order)

    def ordered(self, order: Tensor) -> PagedLayer:
        """The same layer, with the order that its kind has."""
        return PagedLayer(self._attention, self.pages, self.table, order)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it the attention itself reads and writes these pages."""
        outer, self._attention.kv_cache = self._attention.kv_cache, self.pages
        try:
            yield
        finally:
            self._attention.kv_cache = outer

    def write(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Puts rows `[tokens, kv_heads, head_dim]` at `slots`."""
        k, v = (rows.to(self.pages.device, non_blocking=True).contiguous() for rows in (k, v))
        self._attention.impl.do_kv_cache_update(self._attention, k, v, self.pages, slots)

    def snapshot(self, block_ids: Tensor) -> Tensor:
        """A copy of whole pages, `[blocks, elements]`, for `rows` to sort later."""
        return self.pages[block_ids].flatten(1)

    def rows(self, snapshot: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a snapshot, each `[blocks x block_size, kv_heads, head_dim]`."""
        assert self._order is not None, "a cache whose order is unknown is not saved"
        both = snapshot.index_select(1, self._order.to(snapshot.device))
        shape = (2, -1, self._heads, self._width)
        k, v = both.view(snapshot.shape[0], 2, -1).transpose(0, 1).reshape(shape)
        return k, v

    def measure(self) -> Tensor:
        """The place in a page of each element of K, then of V, token-major, `[2 x block_size x row]`.

        Raises:
            Incompatible: pages are no permutation of K and V.
        """
        pages, block_size = self.pages, self.table.block_size
        count = 2 * block_size * self._heads * self._width
        slots = slots_of(torch.tensor([NULL_BLOCK], device=pages.device), 0, block_size, block_size)
        numbers = torch.arange(count, device=pages.device)
        found = torch.zeros(pages[NULL_BLOCK].numel(), dtype=torch.int64, device=pages.device)
        for bit in range(count.bit_length()):
            k, v = ((numbers >> bit) & 1).to(pages.dtype).view(2, block_size, self._heads, self._width)
            self.write(k, v, slots)
            found |= (pages[NULL_BLOCK].flatten() == 1).to(torch.int64) << bit
        pages[NULL_BLOCK].zero_()
        if found.numel() != count or not torch.equal(found.sort().values, numbers):
            raise Incompatible(
                Mismatch.LAYOUT, "vLLM's pages are no permutation of K and V: nothing is saved"
            )
        return found.argsort()
