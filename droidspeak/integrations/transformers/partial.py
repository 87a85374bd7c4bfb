"""Partial prefill: the receiver recomputes the plan's groups, everything else is taken from a source."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from droidspeak.errors import UsageError
from droidspeak.integrations.transformers.decoder import Decoder
from droidspeak.integrations.transformers.kv import KV
from droidspeak.integrations.transformers.mapped import mapped_source
from droidspeak.layerselect import Action, Group, Plan
from droidspeak.layerselect.mapped import LayerSource
from droidspeak.layerselect.mapping import Maps

__all__ = ["PrefixKV", "capture", "partial_prefill"]


@dataclass
class PrefixKV:
    """K and V of every layer of one prefix, and E of some layers, in memory."""

    layers: list[KV] = field(default_factory=list)
    inputs: dict[int, Tensor] = field(default_factory=dict)

    def e(self, layer: int) -> Tensor:
        try:
            return self.inputs[layer]
        except KeyError:
            held = sorted(self.inputs) or "none"
            raise UsageError(f"E of layer {layer} was not captured; captured: {held}") from None

    def kv(self, layer: int) -> KV:
        return self.layers[layer]


def capture(
    model: Decoder | PreTrainedModel,
    token_ids: Tensor,
    e_layers: Collection[int] = (),
    *,
    end: int | None = None,
) -> PrefixKV:
    """What a sender's own prefill of `token_ids` (`[tokens]`, int64) yields, of layers up to `end`."""
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    prefix = PrefixKV()

    def keep(layer: int, k: Tensor, v: Tensor, e: Tensor | None) -> None:
        prefix.layers.append((k, v))
        if e is not None:
            prefix.inputs[layer] = e

    decoder.prefill(token_ids, e_layers=e_layers, on_layer=keep, end=end)
    return prefix


def partial_prefill(
    plan: Plan,
    model: Decoder | PreTrainedModel,
    token_ids: Tensor,
    source: LayerSource,
    *,
    exact_tokens: int = 0,
    maps: Maps | None = None,
) -> list[KV]:
    """K and V of every layer for `token_ids`, mixed by `plan` (paper, section 4).

    The groups are recomputed first: they need only E, so what a stream still loads arrives meanwhile.

    Args:
        model: the receiver.
        token_ids: `[tokens]` int64, the tokens that `source` covers.
        source: is only read.
        exact_tokens: leading tokens whose K and V in `source` are the receiver's own.
        maps: for plans that map; on the model's device.

    Returns:
        Per layer K and V, `[tokens, kv_heads, head_dim]`; `past_key_values` makes a cache of them.

    Raises:
        UsageError: a plan that does not fit the model, or that maps, without maps.
        MapsUnusable: maps that lack a layer, or are for another shape.
        LoadFailed: from `source`.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    if plan.layers != decoder.num_layers:
        raise UsageError(f"plan of {plan.layers} layers for a model of {decoder.num_layers}")
    mapped: LayerSource = source
    if plan.needs_maps:
        if maps is None:
            raise UsageError(f"plan {plan} maps: it needs the maps of its policy")
        maps.require(plan)
        mapped = mapped_source(source, maps, decoder, token_ids, exact_tokens)
    mixed: dict[int, KV] = {}
    for group in plan.groups:
        e = (mapped if plan.map_e else source).e(group.start) if group.start else None
        mixed |= _recompute(decoder, group, token_ids, e, source, exact_tokens)
    for layer, action in enumerate(plan.actions):
        if action is not Action.RECOMPUTE:
            mixed[layer] = (mapped if action is Action.MAP else source).kv(layer)
    return [mixed[layer] for layer in range(plan.layers)]


def _recompute(
    decoder: Decoder,
    group: Group,
    token_ids: Tensor,
    e: Tensor | None,
    source: LayerSource,
    exact_tokens: int,
) -> dict[int, KV]:
    own = {layer: _rows(source.kv(layer), exact_tokens) for layer in group} if exact_tokens else {}
    # Entries outside the group are not read; they only have to be there.
    past = [own.get(layer, own[group.start]) for layer in range(decoder.num_layers)] if own else ()
    fresh = decoder.recompute(token_ids[exact_tokens:], group.start, group.end, e=e, past=past)
    computed = dict(zip(group, fresh, strict=True))
    return {layer: _joined(own[layer], kv) for layer, kv in computed.items()} if own else computed


def _rows(kv: KV, count: int) -> KV:
    return kv[0][:count], kv[1][:count]


def _joined(first: KV, second: KV) -> KV:
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
