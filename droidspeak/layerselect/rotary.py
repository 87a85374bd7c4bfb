"""Keys without their position: a model's own rotary embedding, taken off and put on again.

A key is rotated in pairs of its components, `i` and `i + half` of the rotary part; the rest, if any, is not
(partial rotary). Cosines and sines are the model's own, rounded as it rounds them and scaled as it scales
them, and what takes them off is the exact inverse of that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["Rotary"]


class Rotary(ABC):
    """The rotary embedding of a model's layers."""

    @abstractmethod
    def cos_sin(self, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The model's cosines and sines, each `[positions, rotary_dim]`.

        Args:
            positions: all from 0 on: frequencies may depend on the greatest one.
            layer: layers may differ.
        """

    def rotate(self, k: Tensor, layer: int, first: int = 0) -> Tensor:
        """Keys as attention wants them.

        Args:
            k: un-rotated keys, `[tokens, kv_heads, head_dim]`.
            layer: whose keys they are; layers may differ.
            first: position of row 0.

        Returns:
            Rotated keys, float32.
        """
        (cos_a, cos_b), (sin_a, sin_b), (a, b, rest) = self._parts(k, layer, first)
        return torch.cat([a * cos_a - b * sin_a, b * cos_b + a * sin_b, rest], -1)

    def unrotate(self, k: Tensor, layer: int, first: int = 0) -> Tensor:
        """The inverse of `rotate`, float32."""
        (cos_a, cos_b), (sin_a, sin_b), (a, b, rest) = self._parts(k, layer, first)
        scale = cos_a * cos_b + sin_a * sin_b
        return torch.cat([(a * cos_b + b * sin_a) / scale, (b * cos_a - a * sin_b) / scale, rest], -1)

    def _parts(
        self, k: Tensor, layer: int, first: int
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[Tensor]]:
        """Halves of cosine and sine, `[tokens, 1, half]`; halves and the rest of the keys."""
        positions = torch.arange(first + len(k), device=k.device)
        cos, sin = (part[first:, None].float() for part in self.cos_sin(positions, layer))
        half = cos.shape[-1] // 2
        k = k.float()
        parts = [k[..., :half], k[..., half : 2 * half], k[..., 2 * half :]]
        return cos.chunk(2, -1), sin.chunk(2, -1), parts
