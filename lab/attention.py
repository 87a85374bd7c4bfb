"""Causal attention for training small models on a CPU.

`torch`'s own CPU backward is about three times slower at a head size of 32.  Use
only for whole, unpadded-on-the-left sequences without a cache; importing this module
registers it with transformers under `NAME`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME: Final = "lab_training"


@lru_cache(maxsize=64)
def _causal_mask(length: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Additive mask ``[groups * length, length]`` for query heads stacked per key head."""
    mask = torch.full((length, length), float("-inf")).triu(1).to(dtype)
    return mask.repeat(groups, 1).contiguous()


class _SoftmaxAttention(torch.autograd.Function):
    """softmax(scale * q k^T + mask) v with the probabilities kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale)
        probabilities = torch.softmax(scores, -1)
        ctx.save_for_backward(query, key, value, probabilities)
        ctx.scale = scale
        return torch.bmm(probabilities, value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probabilities = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        value_gradient = torch.bmm(probabilities.transpose(1, 2), gradient)
        score_gradient = torch._softmax_backward_data(
            torch.bmm(gradient, value.transpose(1, 2)), probabilities, -1, probabilities.dtype
        )
        query_gradient = torch.bmm(score_gradient, key).mul_(ctx.scale)
        key_gradient = torch.bmm(score_gradient.transpose(1, 2), query).mul_(ctx.scale)
        return query_gradient, key_gradient, value_gradient, None, None


def training_attention(
    module: torch.nn.Module,  # noqa: ARG001 - the signature is that of transformers
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    scaling: float = 1.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention with the signature that transformers asks for; `attention_mask` is ignored.

    Shapes: query ``[batch, heads, tokens, size]``, key and value with fewer heads;
    returns ``[batch, tokens, heads, size]``.
    """
    batch, heads, length, size = query.shape
    key_heads = key.shape[1]
    groups = heads // key_heads
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else query.dtype
    stacked = query.to(dtype).reshape(batch * key_heads, groups * length, size)
    keys, values = (part.to(dtype).reshape(batch * key_heads, length, size) for part in (key, value))
    with torch.autocast("cpu", enabled=False):
        mask = _causal_mask(length, groups, dtype)
        output: Tensor = _SoftmaxAttention.apply(stacked, keys, values, mask, scaling)  # type: ignore[no-untyped-call]
    return output.view(batch, heads, length, size).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, training_attention)
