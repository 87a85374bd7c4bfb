"""Where layers with a sliding window are recomputed.

Of such a layer vLLM keeps the window before the last loaded token, but each recomputed token attends to the
window before itself. So these layers work in pages of their own, which move along with the tokens:

    tokens       0 ........ | window before | piece | ........ end
    own pages               [---------------|-------]
    vLLM's                                       [-----------]   of these, what a piece has reached is copied
"""

from __future__ import annotations

import torch
from torch import Tensor

from droidspeak.connector import Reason
from droidspeak.errors import LoadFailed
from droidspeak.integrations.vllm_connector.paging import PagedLayer

__all__ = ["WindowPages"]


class WindowPages:
    """Pages of one layer for the recompute of one request.

    Args:
        vllms: the layer as vLLM has it.
        start: the first token that is recomputed.
        budget: tokens of one piece at most.

    Attributes:
        layer: the same layer in these pages.
        origin: the token that the first page begins with.

    Raises:
        LoadFailed: there is no memory for them, or it is not known what vLLM's pages look like.
    """

    def __init__(self, vllms: PagedLayer, start: int, budget: int) -> None:
        assert vllms.table.window is not None, "a layer that keeps all blocks needs no pages of its own"
        if not vllms.measured:
            raise LoadFailed(Reason.OTHER_LAYOUT, "vLLM's pages are of no layout that is known")
        self._vllms, self._size, self._window = vllms, vllms.table.block_size, vllms.table.window
        count = -(-(budget + self._window) // self._size) + 1
        try:
            self.layer = vllms.over(_like(vllms.pages, count))
        except torch.OutOfMemoryError as error:
            raise LoadFailed(Reason.STORE_UNAVAILABLE, f"no memory to recompute in: {error}") from None
        self.block_ids = torch.arange(count, device=vllms.device)
        self.origin = self._origin(start)

    def move(self, start: int) -> None:
        """Makes room for a piece from `start` on, and keeps the window before it."""
        origin = self._origin(start)
        gone = (origin - self.origin) // self._size
        if gone:
            pages = self.layer.pages
            pages[:-gone] = pages[gone:].clone()
            self.origin = origin

    def hand_over(self, block_ids: Tensor, start: int, end: int) -> None:
        """Copies whole blocks of the tokens `start .. end` into vLLM's pages, those of `block_ids`."""
        first, last = start // self._size, -(-end // self._size)
        if first < last:
            before = self.origin // self._size
            self._vllms.pages[block_ids[first:last]] = self.layer.pages[first - before : last - before]

    def _origin(self, start: int) -> int:
        return max(0, start - self._window + 1) // self._size * self._size


def _like(pages: Tensor, count: int) -> Tensor:
    """Empty pages that kernels cannot tell from `pages`: dimensions lie in memory in the same order."""
    order = sorted(range(pages.dim()), key=pages.stride, reverse=True)
    shape = (count, *pages.shape[1:])
    made = pages.new_zeros([shape[place] for place in order])
    return made.permute([order.index(place) for place in range(pages.dim())])
