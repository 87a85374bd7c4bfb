"""What one token's row of a slot looks like for a given model and shard."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from droidspeak.storage import Architecture, Slot, SlotKind

__all__ = ["RowLayout"]


@dataclass(frozen=True)
class RowLayout:
    """Shapes of one row, and the dtype of all.

    Attributes:
        layers: layers of the model.
        kv: `(kv_heads, head_dim)`, of this shard.
        e: `(hidden,)`; every shard holds all of it.
    """

    layers: int
    kv: tuple[int, int]
    e: tuple[int]
    dtype: torch.dtype

    @classmethod
    def of(cls, architecture: Architecture, shards: int = 1) -> RowLayout:
        """Of a model that is split over `shards` tensor-parallel shards."""
        # With more shards than heads, shards share a head.
        heads = max(1, architecture.kv_heads // shards)
        dtype: torch.dtype = getattr(torch, architecture.dtype)
        return cls(architecture.layers, (heads, architecture.head_dim), (architecture.hidden_size,), dtype)

    def row(self, slot: Slot) -> tuple[int, ...]:
        """The shape of one row of `slot`."""
        return self.e if slot.kind is SlotKind.E else self.kv

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's K and V of one layer."""
        return 2 * self.kv[0] * self.kv[1] * self.dtype.itemsize

    @property
    def e_bytes(self) -> int:
        """Bytes of one token's E of one layer."""
        return self.e[0] * self.dtype.itemsize

    def row_bytes(self, slot: Slot) -> int:
        """Bytes of one row of `slot`."""
        return self.e_bytes if slot.kind is SlotKind.E else self.kv_bytes // 2
