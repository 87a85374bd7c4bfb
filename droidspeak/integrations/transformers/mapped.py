"""A source whose E, K and V are mapped to what the receiver would have computed."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from droidspeak.integrations.transformers.decoder import Decoder
from droidspeak.integrations.transformers.kv import KV
from droidspeak.integrations.transformers.rotary import Rotary
from droidspeak.layerselect.mapping import Maps

if TYPE_CHECKING:
    from droidspeak.integrations.transformers.partial import LayerSource

__all__ = ["MappedSource"]


class MappedSource:
    """Maps what comes from `source`.

    Args:
        source: the sender's E, K and V.
        decoder: the receiver.
        token_ids: `[tokens]` int64, what `source` covers.
        exact_tokens: leading tokens whose K and V are the receiver's own, and stay as they are; E of `source`
            is of the tokens after them.
    """

    def __init__(
        self, source: LayerSource, maps: Maps, decoder: Decoder, token_ids: Tensor, exact_tokens: int = 0
    ) -> None:
        self._source, self._maps, self._decoder = source, maps, decoder
        self._token_ids, self._exact_tokens = token_ids, exact_tokens
        self._rotary = Rotary(decoder)

    def e(self, layer: int) -> Tensor:
        """Mapped E, `[tokens, hidden]` in the dtype of the source. Raises `MapsUnusable`."""
        return self._maps.map_e(layer, self._source.e(layer), self._embeddings)

    def kv(self, layer: int) -> KV:
        """Mapped K and V of all tokens, in the dtype of the source. Raises `MapsUnusable`."""
        first = self._exact_tokens
        own_k, own_v = self._source.kv(layer)
        k, v = self._maps.map_kv(
            layer, self._rotary.unrotate(own_k[first:], layer, first), own_v[first:], self._embeddings
        )
        k = self._rotary.rotate(k, layer, first)
        return torch.cat([own_k[:first], k.to(own_k)]), torch.cat([own_v[:first], v.to(own_v)])

    @cached_property
    def _embeddings(self) -> Tensor | None:
        return self._decoder.embed(self._token_ids) if self._maps.need_embeddings else None
