"""K and V between the project's layout and the caches of transformers.

Here K and V of one layer of one request are token-major, `[tokens, kv_heads, head_dim]`, RoPE applied.
A transformers cache holds `[batch, kv_heads, columns, head_dim]`; a sliding-window layer holds only its last
`window - 1` columns and remembers how many it has seen.

    empty_cache      the cache that a model expects, nothing in it
    past_key_values  one request's K and V of every layer -> a cache ready for `model(...)` and `generate`
    plan_batch       how many cached tokens each row of a left-padded batch may keep
    stack            several requests' K and V -> one cache for that batch
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from droidspeak.errors import UsageError

__all__ = ["KV", "BatchPlan", "empty_cache", "past_key_values", "plan_batch", "stack"]

KV: TypeAlias = tuple[Tensor, Tensor]
"""K and V of one layer, each `[tokens, kv_heads, head_dim]`."""

_HOLDS_ONLY_KV = (DynamicLayer, DynamicSlidingWindowLayer)


class BatchPlan(NamedTuple):
    """Columns `[0, columns)` of a left-padded batch come from the cache, in every row.

    `kept[i]` is how many of them are cached tokens of row i; the others are its padding.
    """

    columns: int
    kept: tuple[int, ...]


def empty_cache(model_config: Any) -> DynamicCache:
    """The cache that a model of `model_config` expects, empty.

    Raises:
        UsageError: a layer keeps more than K and V of tokens (linear attention, an indexer).
    """
    cache = DynamicCache(config=model_config)
    for layer, slot in enumerate(cache.layers):
        if type(slot) not in _HOLDS_ONLY_KV:
            raise UsageError(
                f"layer {layer} keeps its state in a {type(slot).__name__}, not in K and V of tokens"
            )
    return cache


def past_key_values(model_config: Any, layers: Sequence[KV]) -> DynamicCache:
    """One request's cache (batch of 1) over K and V of every layer, without a copy.

    The cache only ever grows by concatenation, so the tensors given here are never written to.

    Args:
        model_config: configuration of the model that will use the cache.
        layers: per layer K and V, `[tokens, kv_heads, head_dim]`, of the same tokens in every layer.

    Raises:
        UsageError: the number of layers is not the model's, or layers differ in tokens.
    """
    cache = empty_cache(model_config)
    _check_layers(layers, len(cache.layers))
    for slot, (k, v) in zip(cache.layers, layers, strict=True):
        seen = k.shape[0]
        first = seen - _held(slot, seen)
        _fill(slot, k[first:].transpose(0, 1)[None], v[first:].transpose(0, 1)[None], seen)
    return cache


def plan_batch(lengths: Sequence[int], cached: Sequence[int]) -> BatchPlan:
    """Divide a left-padded batch into cached columns and columns to compute.

    All rows end at the same column and are computed from the same column on, so the row with the most tokens
    that are not cached sets how many columns are computed; every other row gives up cached tokens to match.
    At least one token of each row is computed: a cache alone yields no logits.

    Args:
        lengths: tokens of each row's whole prompt.
        cached: leading tokens of each row that have K and V.

    Raises:
        UsageError: no rows, or a row with fewer tokens than are cached.
    """
    if not lengths or any(not 0 <= have <= n for n, have in zip(lengths, cached, strict=True)):
        raise UsageError("a batch needs rows, and a row cannot have more cached tokens than tokens")
    computed = max(1, *(n - have for n, have in zip(lengths, cached, strict=True)))
    return BatchPlan(max(0, max(lengths) - computed), tuple(max(0, n - computed) for n in lengths))


def stack(model_config: Any, rows: Sequence[Sequence[KV]], plan: BatchPlan) -> DynamicCache:
    """One cache `[batch, kv_heads, plan.columns, head_dim]` for a left-padded batch; padding is zeros.

    `generate(input_ids, attention_mask=..., past_key_values=...)` takes it together with the whole padded
    prompts and the mask that hides their padding.

    Args:
        model_config: configuration of the model that will use the cache.
        rows: per row and layer K and V, `[at least plan.kept[row], kv_heads, head_dim]`; a row that keeps
            nothing may be empty.
        plan: what `plan_batch` says about these rows.

    Raises:
        UsageError: a row has fewer layers than the model, or fewer tokens than the plan keeps of it.
    """
    cache = empty_cache(model_config)
    for row, kept in zip(rows, plan.kept, strict=True):
        if kept:
            _check_layers(row, len(cache.layers), at_least=kept)
    if plan.columns:
        for layer, slot in enumerate(cache.layers):
            held = _held(slot, plan.columns)
            pairs = [row[layer] if kept else None for row, kept in zip(rows, plan.kept, strict=True)]
            k = _left_pad([pair and pair[0] for pair in pairs], plan.kept, held)
            v = _left_pad([pair and pair[1] for pair in pairs], plan.kept, held)
            _fill(slot, k, v, plan.columns)
    return cache


def _held(slot: DynamicLayer, seen: int) -> int:
    """How many of the columns seen `slot` still holds."""
    return min(seen, slot.sliding_window - 1) if slot.is_sliding else seen


def _fill(slot: DynamicLayer, keys: Tensor, values: Tensor, seen: int) -> None:
    """Let `slot` hold these states `[batch, kv_heads, held, head_dim]` as they are, after `seen` columns."""
    slot.lazy_initialization(keys, values)
    slot.keys, slot.values = keys, values
    if slot.is_sliding:
        slot.cumulative_length = seen


def _left_pad(states: Sequence[Tensor | None], kept: Sequence[int], width: int) -> Tensor:
    """The last `width` columns `[batch, heads, width, head_dim]` of rows that end at token `kept[row]`."""
    like = next(state for state in states if state is not None)
    padded = like.new_zeros(len(states), width, *like.shape[1:])
    for row, (state, end) in enumerate(zip(states, kept, strict=True)):
        if state is not None:
            count = min(end, width)
            padded[row, width - count :] = state[end - count : end]
    return padded.transpose(1, 2)


def _check_layers(layers: Sequence[KV], expected: int, *, at_least: int | None = None) -> None:
    if len(layers) != expected:
        raise UsageError(f"K and V of {len(layers)} layers were given, the model has {expected}")
    lengths = {state.shape[0] for pair in layers for state in pair}
    if len(lengths) != 1:
        raise UsageError(f"every layer must hold the same tokens, but lengths {sorted(lengths)} were given")
    if at_least is not None and min(lengths) < at_least:
        raise UsageError(f"K and V of {min(lengths)} tokens were given, the plan keeps {at_least}")
