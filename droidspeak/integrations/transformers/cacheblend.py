"""CacheBlend, as a baseline: of all layers, recompute the tokens whose keys differ most.

Yao et al., EuroSys'25 (arXiv 2405.16444), made for chunks of one model's cache that were computed without
what came before them. Here the cache is another model's, as in the comparison of the paper (section 6).
"""

from __future__ import annotations

from torch import Tensor

from droidspeak.errors import UsageError
from droidspeak.integrations.transformers.decoder import Decoder
from droidspeak.integrations.transformers.kv import KV
from droidspeak.integrations.transformers.partial import PrefixKV

__all__ = ["blend"]

_CHECKED_LAYER = 1


def blend(receiver: Decoder, token_ids: Tensor, sent: PrefixKV, own: PrefixKV, ratio: float) -> list[KV]:
    """The sender's cache with `ratio` of the tokens recomputed by `receiver` in all layers.

    Layer 0 is recomputed in full. The tokens whose keys in layer 1 differ most from the sender's are
    recomputed from there on, each over the mixed cache of the tokens before it.

    Args:
        token_ids: `[tokens]` int64.
        sent: the sender's cache; only read.
        own: the receiver's own, with E of layer 1: what the two first layers yield is taken from it.
        ratio: share of tokens, 0 .. 1.

    Raises:
        UsageError: a model of one layer, or one that attends to a window.
    """
    if receiver.num_layers <= _CHECKED_LAYER:
        raise UsageError("CacheBlend needs a model of at least two layers")
    mixed = [own.layers[0], *((k.clone(), v.clone()) for k, v in sent.layers[1:])]
    rows = _most_different(own.layers[_CHECKED_LAYER][0], sent.layers[_CHECKED_LAYER][0], ratio)
    if len(rows):
        e = own.e(_CHECKED_LAYER)[rows]
        receiver.recompute_rows(rows, token_ids, _CHECKED_LAYER, e, mixed)
    return mixed


def _most_different(own: Tensor, sent: Tensor, ratio: float) -> Tensor:
    """Positions of the rows that differ most, ascending."""
    difference = (own.float() - sent.float()).square().sum(dim=(1, 2))
    return difference.topk(round(ratio * len(difference))).indices.sort().values
