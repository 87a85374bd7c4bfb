"""Memory for objects that are received, used again when an object is gone.

A server that holds as much as it may frees one object for each that comes. Given back to the C library, that
memory is cut and glued until a tenth of it lies idle; given back to the system, each of its pages costs a
fault at the next object. KV objects of one model have one size: so each gets pages of its own, and these are
kept for the next of that size.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import OrderedDict

import numpy as np
import torch

__all__ = ["Buffers"]

_SMALL = 128 << 10


class Buffers:
    """Hands out memory; it comes back by itself when nothing refers to it any more.

    Args:
        idle: bytes that may be kept for later.
    """

    def __init__(self, idle: int = 64 << 20) -> None:
        self._limit = idle
        self._lock = threading.RLock()  # a buffer can come back in the middle of `take`, by a collection
        self._free: OrderedDict[int, list[mmap.mmap]] = OrderedDict()
        self._idle = 0

    @property
    def idle(self) -> int:
        """Bytes that are kept for later."""
        return self._idle

    def take(self, nbytes: int) -> torch.Tensor:
        """A flat `uint8` tensor of any content."""
        if nbytes < _SMALL:
            return torch.empty(nbytes, dtype=torch.uint8)
        pages = self._pages(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        array = np.frombuffer(pages, dtype=np.uint8, count=nbytes)
        weakref.finalize(array, self._give_back, pages).atexit = False
        return torch.from_numpy(array)

    def _pages(self, size: int) -> mmap.mmap:
        with self._lock:
            kept = self._free.get(size)
            if kept:
                self._idle -= size
                return kept.pop()
        return mmap.mmap(-1, size)

    def _give_back(self, pages: mmap.mmap) -> None:
        size = len(pages)
        with self._lock:
            self._free.setdefault(size, []).append(pages)
            self._free.move_to_end(size)
            self._idle += size
            # Sizes that nobody asks for any more go first.
            while self._idle > self._limit:
                oldest = next(iter(self._free))
                if self._free[oldest]:
                    self._free[oldest].pop()
                    self._idle -= oldest
                else:
                    del self._free[oldest]
