"""Keys without their position: a model's own rotary embedding, taken off and put on again.

A key is rotated in pairs of its components, `i` and `i + half` of the rotary part; the rest, if any, is not
(partial rotary). Cosines and sines are the model's own, rounded as it rounds them and scaled as it scales
them, and what takes them off is the exact inverse of that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from droidspeak.errors import UsageError
from droidspeak.integrations.transformers.decoder import Decoder

__all__ = ["Rotary"]

_VERIFIED_TOKENS = 64
_TOLERANCE = 16
"""Units in the last place that un-rotated keys of one input may be apart, of the largest component."""


class Rotary:
    """The rotary embedding of the layers of `decoder`."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

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

    def verify(self) -> None:
        """Checks each layer: one input at many positions must give one un-rotated key.

        Raises:
            UsageError: the model rotates otherwise, or not at all; names its class.
        """
        # Any token will do that is not padding: those may have no embedding.
        ids = torch.full((_VERIFIED_TOKENS,), self._decoder.config.vocab_size // 2)
        e = self._decoder.embed(ids)
        for layer in range(self._decoder.num_layers):
            [(k, _)] = self._decoder.recompute(ids, layer, layer, e=e if layer else None)
            k = self.unrotate(k, layer)
            allowed = _TOLERANCE * torch.finfo(self._decoder.dtype).eps * k.abs().amax()
            if not ((k - k[:1]).abs() <= allowed).all():
                name = type(self._decoder.model).__name__
                raise UsageError(f"keys of {name} (layer {layer}) cannot be un-rotated: no K can be mapped")

    def _parts(
        self, k: Tensor, layer: int, first: int
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[Tensor]]:
        """Halves of cosine and sine, `[tokens, 1, half]`; halves and the rest of the keys."""
        # From 0 on: frequencies may depend on the greatest position.
        positions = torch.arange(first + len(k), device=k.device)
        cos, sin = (part[first:, None].float() for part in self._decoder.rotary(positions, layer))
        half = cos.shape[-1] // 2
        k = k.float()
        parts = [k[..., :half], k[..., half : 2 * half], k[..., 2 * half :]]
        return cos.chunk(2, -1), sin.chunk(2, -1), parts
