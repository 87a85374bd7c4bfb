"""The rotary embedding of a transformers model."""

from __future__ import annotations

import torch
from torch import Tensor

from droidspeak.errors import UsageError
from droidspeak.integrations.transformers.decoder import Decoder
from droidspeak.layerselect.rotary import Rotary

__all__ = ["DecoderRotary"]

_VERIFIED_TOKENS = 64
_TOLERANCE = 16
"""Units in the last place that un-rotated keys of one input may be apart, of the largest component."""


class DecoderRotary(Rotary):
    """The rotary embedding of the layers of `decoder`."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def cos_sin(self, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return self._decoder.rotary(positions, layer)

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
