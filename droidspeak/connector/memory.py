"""Host memory for loads, kept from one load for the next.

Memory that is new to a process costs a page fault for each of its pages, which can take longer than to read
and check what goes there. A block is used again when nothing refers to it any more: not the stream, not a
tensor that it gave out, and not a read that has missed its deadline and may still write.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch

__all__ = ["Lease", "LoadMemory"]

_STEP = 1 << 20
_ALIGNMENT = 64


@dataclass
class _Block:
    memory: mmap.mmap
    lent: weakref.ref[memoryview]

    @property
    def free(self) -> bool:
        """Whether no tensor is left on it."""
        return self.lent() is None


class Lease:
    """Memory of one load, that tensors are cut from."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._rest = memory

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor. What was not asked for when the memory was taken gets memory of its own."""
        nbytes = prod(shape) * dtype.itemsize
        if nbytes > len(self._rest):
            return torch.empty(shape, dtype=dtype)
        cut, self._rest = self._rest[:nbytes], self._rest[_aligned(nbytes) :]
        return cut.view(dtype).view(shape)


class LoadMemory:
    """Blocks of host memory. Threads may share it.

    Args:
        keep: bytes of blocks at most; what does not fit is memory as any other.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._blocks: list[_Block] = []

    @property
    def kept(self) -> int:
        """Bytes of all blocks, in use or not."""
        with self._lock:
            return sum(len(block.memory) for block in self._blocks)

    def lease(self, sizes: Iterable[int]) -> Lease:
        """Memory for tensors of these sizes in bytes, with any content; used again when they are all gone."""
        nbytes = sum(map(_aligned, sizes))
        with self._lock:
            block = self._found(nbytes) if nbytes else None
            if block is None:
                return Lease(torch.empty(nbytes, dtype=torch.uint8))
            lent = memoryview(block.memory)[:nbytes]
            block.lent = weakref.ref(lent)
            return Lease(torch.frombuffer(lent, dtype=torch.uint8))

    def _found(self, nbytes: int) -> _Block | None:
        free = [block for block in self._blocks if block.free and len(block.memory) >= nbytes]
        if free:
            return min(free, key=lambda block: len(block.memory))
        size = -(-nbytes // _STEP) * _STEP
        if not self._room(size):
            return None
        block = _Block(mmap.mmap(-1, size), weakref.ref(memoryview(b"")))
        self._blocks.append(block)
        return block

    def _room(self, size: int) -> bool:
        """Whether a new block may be made; smaller ones that are free make room for it."""
        if size > self._keep:
            return False
        taken = sum(len(block.memory) for block in self._blocks)
        for block in sorted((block for block in self._blocks if block.free), key=lambda one: len(one.memory)):
            if taken + size <= self._keep:
                break
            self._blocks.remove(block)
            taken -= len(block.memory)
        return taken + size <= self._keep


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
