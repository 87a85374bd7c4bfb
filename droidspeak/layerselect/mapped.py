"""A source whose E, K and V are mapped to what the receiver would have computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from droidspeak.layerselect.mapping import Maps
from droidspeak.layerselect.rotary import Rotary

__all__ = ["LayerSource", "MappedSource"]


class LayerSource(Protocol):
    """Where K, V and E come from: a layer stream, or tensors at hand."""

    def e(self, layer: int) -> Tensor:
        """E of a transition layer for the tokens after the exact ones, `[tokens, hidden]`."""

    def kv(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer for all tokens; of a recomputed layer only the exact ones need be there."""


class MappedSource:
    """Maps what comes from `source`.

    Args:
        source: the sender's E, K and V.
        rotary: the receiver's.
        embed: the receiver's embeddings of all tokens that `source` covers, `[tokens, hidden]`; called at
            most once, and only if the maps read them.
        exact_tokens: leading tokens whose K and V are the receiver's own, and stay as they are; E of `source`
            is of the tokens after them.
    """

    def __init__(
        self,
        source: LayerSource,
        maps: Maps,
        rotary: Rotary,
        embed: Callable[[], Tensor],
        exact_tokens: int = 0,
    ) -> None:
        self._source, self._maps, self._rotary, self._embed = source, maps, rotary, embed
        self._exact_tokens = exact_tokens

    def e(self, layer: int) -> Tensor:
        """Mapped E, `[tokens, hidden]` in the dtype of the source. Raises `MapsUnusable`."""
        return self._maps.map_e(layer, self._source.e(layer), self.embeddings)

    def kv(self, layer: int) -> tuple[Tensor, Tensor]:
        """Mapped K and V of all tokens, in the dtype of the source. Raises `MapsUnusable`."""
        first = self._exact_tokens
        own_k, own_v = self._source.kv(layer)
        k, v = self._maps.map_kv(
            layer, self._rotary.unrotate(own_k[first:], layer, first), own_v[first:], self.embeddings
        )
        k = self._rotary.rotate(k, layer, first)
        return torch.cat([own_k[:first], k.to(own_k)]), torch.cat([own_v[:first], v.to(own_v)])

    @cached_property
    def embeddings(self) -> Tensor | None:
        """What `embed` gave; `None` if the maps read none."""
        return self._embed() if self._maps.need_embeddings else None
