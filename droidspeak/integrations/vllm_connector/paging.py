"""Token-major rows in and out of vLLM's paged cache.

Rows are written by the attention backend itself, which knows its pages. They are read by a permutation that
is measured once: element numbers are written into a block through the backend, bit by bit, and where they
turn up is where that element lies. So no layout is written down here, and a backend that does not merely
move elements (a quantised cache, say) is found out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from droidspeak.errors import Incompatible
from droidspeak.storage import Mismatch

__all__ = ["PagedLayer", "slots_of"]

_SCRATCH = 0  # vLLM's null block: nobody's tokens lie there


def slots_of(block_ids: Tensor, start: int, end: int, block_size: int) -> Tensor:
    """Slots of the tokens `start .. end` of a request, `[end - start]`, int64."""
    positions = torch.arange(start, end, device=block_ids.device)
    return block_ids[positions // block_size] * block_size + positions % block_size


class PagedLayer:
    """The pages of one attention layer.

    Args:
        attention: vLLM's `Attention` module.
        pages: its cache, `[blocks, kv_heads, block_size, content]`.
        order: as `measure` found it on a layer of the same kind.
    """

    def __init__(self, attention: Any, pages: Tensor, order: Tensor | None) -> None:
        self._attention, self._pages, self._order = attention, pages, order
        self._heads, self._width = attention.num_kv_heads, attention.head_size

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self._pages.device

    def write(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Puts rows `[tokens, kv_heads, head_dim]` at `slots`."""
        k, v = (rows.to(self._pages.device, non_blocking=True).contiguous() for rows in (k, v))
        self._attention.impl.do_kv_cache_update(self._attention, k, v, self._pages, slots)

    def snapshot(self, block_ids: Tensor) -> Tensor:
        """A copy of whole pages, `[blocks, elements]`, for `rows` to sort later."""
        return self._pages[block_ids].flatten(1)

    def rows(self, snapshot: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a snapshot, each `[blocks x block_size, kv_heads, head_dim]`."""
        assert self._order is not None, "a cache whose order is unknown is not saved"
        both = snapshot.index_select(1, self._order.to(snapshot.device))
        shape = (2, -1, self._heads, self._width)
        k, v = both.view(snapshot.shape[0], 2, -1).transpose(0, 1).reshape(shape)
        return k, v

    @staticmethod
    def measure(attention: Any, pages: Tensor, block_size: int) -> Tensor:
        """The place in a page of each element of K, then of V, token-major, `[2 x block_size x row]`.

        Raises:
            Incompatible: pages are no permutation of K and V.
        """
        heads, width = attention.num_kv_heads, attention.head_size
        count = 2 * block_size * heads * width
        slots = slots_of(torch.tensor([_SCRATCH], device=pages.device), 0, block_size, block_size)
        layer = PagedLayer(attention, pages, None)
        numbers = torch.arange(count, device=pages.device)
        found = torch.zeros(pages[_SCRATCH].numel(), dtype=torch.int64, device=pages.device)
        for bit in range(count.bit_length()):
            k, v = ((numbers >> bit) & 1).to(pages.dtype).view(2, block_size, heads, width)
            layer.write(k, v, slots)
            found |= (pages[_SCRATCH].flatten() == 1).to(torch.int64) << bit
        pages[_SCRATCH].zero_()
        if found.numel() != count or not torch.equal(found.sort().values, numbers):
            raise Incompatible(
                Mismatch.LAYOUT, "vLLM's pages are no permutation of K and V: nothing is saved"
            )
        return found.argsort()
