"""What a map sees of a token.

    LINEAR      what is mapped: E, and E of unit mean square; or K, un-rotated, and V
    EMBEDDING   also the receiver's embeddings of the token and of those before it, of unit mean square: early
                layers look at little else, and K and V of layer 0 are linear in the token's own
    RANDOM      also random rectified combinations of all these: what is not linear

Each kind begins with the columns of the one before, so one set of moments fits all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache

import numpy
import torch
from torch import Tensor

__all__ = ["MapFeatures", "columns", "e_features", "kv_features"]

_WINDOW = 3
_RANDOM_COLUMNS = 1024
_SEED = 241102820
_EPSILON = 1e-6


class MapFeatures(StrEnum):
    """Kinds of features, each with the columns of the one before."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    RANDOM = "random"


def columns(kind: MapFeatures, mapped: int, hidden: int) -> int:
    """Features that `kind` makes of `mapped` columns and of embeddings of `hidden`."""
    window = 0 if kind is MapFeatures.LINEAR else _WINDOW * hidden
    return mapped + window + (_RANDOM_COLUMNS if kind is MapFeatures.RANDOM else 0)


def e_features(kind: MapFeatures, e: Tensor, embeddings: Tensor | None) -> Tensor:
    """Features of an E map, `[rows, features]` float32.

    Args:
        e: E of the sender, `[rows, hidden]`.
        embeddings: of the receiver, for all tokens up to the last row, `[tokens, hidden]`; not read by
            `LINEAR`.
    """
    unit = _unit(e)
    return _features(kind, [e.float(), unit], [unit], embeddings)


def kv_features(kind: MapFeatures, k: Tensor, v: Tensor, embeddings: Tensor | None) -> Tensor:
    """Features of a KV map, `[rows, features]` float32.

    Args:
        k: un-rotated keys of the sender, `[rows, kv_heads, head_dim]`.
        v: its values, of the same shape.
        embeddings: as in `e_features`.
    """
    k, v = k.float().flatten(1), v.float().flatten(1)
    return _features(kind, [k, v], [_unit(k), _unit(v)], embeddings)


def _features(
    kind: MapFeatures, mapped: list[Tensor], units: Sequence[Tensor], embeddings: Tensor | None
) -> Tensor:
    if kind is MapFeatures.LINEAR:
        return torch.cat(mapped, 1)
    assert embeddings is not None
    window = _window(_unit(embeddings), len(mapped[0]))
    random = [_random(torch.cat([*units, *window], 1))] if kind is MapFeatures.RANDOM else []
    return torch.cat([*mapped, *window, *random], 1)


def _unit(x: Tensor) -> Tensor:
    """Rows of unit mean square, as a layer's norm makes them."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPSILON)


def _window(embeddings: Tensor, rows: int) -> list[Tensor]:
    """For the last `rows` tokens: each one's embedding, then the one's before; zeros before the first."""
    padded = torch.cat([embeddings.new_zeros(_WINDOW - 1, embeddings.shape[1]), embeddings])
    end = len(padded)
    return [padded[end - back - rows : end - back] for back in range(_WINDOW)]


def _random(x: Tensor) -> Tensor:
    weight, bias = _projection(x.shape[1], x.device)
    return torch.relu(torch.addmm(bias, x, weight))


@lru_cache(maxsize=8)
def _projection(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uniform weights of variance 1 / `width`, and biases within -1 .. 1.

    Made of the raw bits of Philox, which are the same everywhere; numpy's distributions may change.
    """
    bits = numpy.random.Philox(key=_SEED).random_raw((width + 1) * _RANDOM_COLUMNS)
    uniform = torch.from_numpy((bits >> 40).astype(numpy.float32) / 2**23 - 1).to(device)
    uniform = uniform.reshape(width + 1, _RANDOM_COLUMNS)
    return uniform[:-1] * math.sqrt(3 / width), uniform[-1]
