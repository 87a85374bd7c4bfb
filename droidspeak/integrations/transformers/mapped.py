"""What comes from a sender, mapped for a transformers model."""

from __future__ import annotations

from torch import Tensor

from droidspeak.integrations.transformers.decoder import Decoder
from droidspeak.integrations.transformers.rotary import DecoderRotary
from droidspeak.layerselect.mapped import LayerSource, MappedSource
from droidspeak.layerselect.mapping import Maps

__all__ = ["mapped_source"]


def mapped_source(
    source: LayerSource, maps: Maps, decoder: Decoder, token_ids: Tensor, exact_tokens: int = 0
) -> MappedSource:
    """Maps what comes from `source`.

    Args:
        decoder: the receiver.
        token_ids: `[tokens]` int64, what `source` covers.
        exact_tokens: as of `MappedSource`.
    """
    return MappedSource(source, maps, DecoderRotary(decoder), lambda: decoder.embed(token_ids), exact_tokens)
