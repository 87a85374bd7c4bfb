"""The rotary embeddings of vLLM's layers, for keys that are mapped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from droidspeak.errors import MapsUnusable
from droidspeak.layerselect.rotary import Rotary

__all__ = ["EngineRotary"]

_VERIFIED_TOKENS = 64
_TOLERANCE = 16
"""Units in the last place that keys rotated by vLLM and here may be apart, of the largest component."""


class EngineRotary(Rotary):
    """Reads the tables of the layers' own `rotary_emb`.

    Args:
        layers: vLLM's decoder layers.

    Raises:
        MapsUnusable: a layer has none, or it rotates otherwise than its table says.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._modules = [_module(layer) for layer in layers]
        # Most models have one for all layers.
        first = {id(module): layer for layer, module in reversed(list(enumerate(self._modules)))}
        for layer in first.values():
            self._verify(layer)

    def cos_sin(self, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        table = self._modules[layer].cos_sin_cache[positions]
        cos, sin = table.chunk(2, -1)
        return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)

    def _verify(self, layer: int) -> None:
        module = self._modules[layer]
        table = module.cos_sin_cache
        tokens = min(_VERIFIED_TOKENS, len(table))
        draw = torch.Generator().manual_seed(0)
        k = torch.randn(tokens, 1, module.head_size, generator=draw).to(table)
        positions = torch.arange(tokens, device=table.device)
        theirs, _ = module.forward_native(positions, k.flatten(1).clone(), k.flatten(1).clone())
        allowed = _TOLERANCE * torch.finfo(table.dtype).eps * k.abs().amax()
        if not ((self.rotate(k, layer).flatten(1) - theirs.float()).abs() <= allowed).all():
            raise MapsUnusable(f"keys of layer {layer} are rotated in a way that maps do not know")


def _module(layer: Any) -> Any:
    module = getattr(getattr(layer, "self_attn", None), "rotary_emb", None)
    if not hasattr(module, "cos_sin_cache"):
        raise MapsUnusable("a layer without a rotary embedding: no key of it can be mapped")
    return module
