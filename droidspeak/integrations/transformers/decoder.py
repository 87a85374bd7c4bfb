"""What DroidSpeak needs from a model: prefill that captures K, V and E, and recompute of a group of layers.

No architecture is written anew and the user's modules are never touched. The model's own forward runs on a
*view*: a shallow copy of the decoder whose `layers` are stand-ins, so that masks, positions and rotary
embeddings stay the model's business:

    Skip    a layer that does nothing             (before the recompute group)
    Enter   a layer that takes E as its input     (the transition layer)
    Tap     a layer whose input is captured as E

K and V are read where every architecture hands them over, in `Cache.update`, after RoPE. The forward ends as
soon as the last layer of the group has handed over its own: nobody needs what comes after.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from droidspeak.errors import UsageError
from droidspeak.integrations.transformers.kv import KV, empty_cache, past_key_values

__all__ = ["Decoder", "OnLayer"]

OnLayer: TypeAlias = Callable[[int, Tensor, Tensor, Tensor | None], None]
"""Called with a layer, its K and V `[tokens, kv_heads, head_dim]` and, if asked, its E `[tokens, hidden]`."""


class Decoder:
    """The decoder of a causal language model of the `model.model.layers` shape, PEFT-wrapped or not.

    Holds no state between calls: threads may share one.

    Attributes:
        model: the model as given.
        config: configuration of its text decoder.
        num_layers: decoder layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises UsageError if the model is not of that shape, or keeps more than K and V of tokens."""
        self.model = model
        self._decoder = _inner_decoder(model)
        self.config = self._decoder.config
        self.num_layers: int = self.config.num_hidden_layers
        if len(empty_cache(self.config).layers) != self.num_layers:
            raise UsageError(f"{_name(model)} shares K and V between layers; each layer must have its own")

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        device: torch.device = self._decoder.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights, hence of K, V and E."""
        dtype: torch.dtype = self._decoder.dtype
        return dtype

    def prefill(
        self,
        token_ids: Tensor,
        *,
        past: Sequence[KV] = (),
        e_layers: Collection[int] = (),
        on_layer: OnLayer | None = None,
        end: int | None = None,
    ) -> DynamicCache:
        """The model's own prefill of `token_ids`, up to the K and V of the last layer; no logits.

        Args:
            token_ids: `[tokens]` int64, at least one.
            past: per layer K and V of the tokens before these, computed by this very model.
            e_layers: layers whose E `on_layer` gets; for the others it gets None.
            on_layer: called in ascending order, as soon as a layer has its K and V, with those of `token_ids`
                alone, as views into the cache. What it raises ends the prefill.
            end: last layer that is wanted, inclusive; all by default. The cache of later layers stays empty.

        Returns:
            The cache of past and new tokens, ready as `past_key_values` of `model(...)` and `generate`.

        Raises:
            UsageError: arguments that do not fit the model, or a model in training mode.
        """
        last = self.num_layers - 1 if end is None else end
        cache = self._cache(past, 0, last)
        recorder = _Recorder(cache, last, on_layer)
        layers = [
            _Tap(layer, partial(recorder.inputs.__setitem__, index)) if index in e_layers else layer
            for index, layer in enumerate(self._decoder.layers)
        ]
        self._run(token_ids, layers, recorder)
        return cache

    def embed(self, token_ids: Tensor) -> Tensor:
        """E of layer 0 for `token_ids`, `[tokens]`: their embeddings as the model scales them."""
        found: list[Any] = []
        self.prefill(token_ids, e_layers=[0], end=0, on_layer=lambda *layer: found.append(layer))
        e: Tensor = found[0][-1]
        return e

    def rotary(self, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary embedding of `layer`, `[positions, rotary_dim]` in the model's dtype.

        Raises:
            UsageError: a model without a rotary embedding of the usual shape.
        """
        rotary = getattr(self._decoder, "rotary_emb", None)
        if rotary is None:
            raise UsageError(f"{_name(self.model)} has no `model.rotary_emb`")
        # Gemma 3: one embedding per type of layer.
        by_type = isinstance(getattr(rotary, "rope_type", None), dict)
        types = [self.config.layer_types[layer]] if by_type else []
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = rotary(like, positions[None], *types)
        return cos[0], sin[0]

    def recompute(
        self,
        token_ids: Tensor,
        start: int,
        end: int,
        *,
        e: Tensor | None = None,
        past: Sequence[KV] = (),
        on_layer: OnLayer | None = None,
    ) -> list[KV]:
        """K and V of the recompute group `[start, end]`, computed by this model from the sender's E.

        Args:
            token_ids: `[tokens]` int64, at least one.
            start: first layer of the group, the transition layer.
            end: last layer of the group, inclusive.
            e: E cache of layer `start`, `[tokens, hidden]`; None for a group that starts at layer 0, which
                enters with the model's own embeddings.
            past: per layer K and V of the tokens before these; entries outside the group are not read.
            on_layer: called with each layer of the group as soon as it has its K and V, and with None for E.

        Returns:
            K and V of layers start..end for `token_ids` alone. They are views: while they live, so do the K
            and V of `past` that the layer attended to.

        Raises:
            UsageError: arguments that do not fit the model, or a model in training mode.
        """
        self._check_group(len(token_ids), start, end, e)
        group: list[KV] = []

        def keep(layer: int, k: Tensor, v: Tensor, _: Tensor | None) -> None:
            group.append((k, v))
            if on_layer is not None:
                on_layer(layer, k, v, None)

        layers = list(self._decoder.layers)
        layers[:start] = map(_Skip, layers[:start])
        if e is not None:
            layers[start] = _Enter(layers[start], e)
        self._run(token_ids, layers, _Recorder(self._cache(past, start, end), end, keep))
        return group

    def recompute_rows(
        self, rows: Tensor, token_ids: Tensor, start: int, e: Tensor, into: Sequence[KV]
    ) -> None:
        """K and V of some tokens in layers `start` to the last, written over theirs in `into`.

        Each attends to the tokens up to its own, as `into` holds them by then.

        Args:
            rows: `[n]` int64, positions of these tokens, ascending.
            token_ids: `[tokens]` int64, all tokens of the prefix.
            e: their E cache of layer `start`, `[n, hidden]`.
            into: per layer K and V of all tokens; changed in place.

        Raises:
            UsageError: a model whose attention has a window, or in training mode.
        """
        if any(layer.is_sliding for layer in empty_cache(self.config).layers):
            raise UsageError(f"{_name(self.model)} attends to a window: single tokens cannot be recomputed")
        layers = list(self._decoder.layers)
        layers[:start] = map(_Skip, layers[:start])
        layers[start] = _Enter(layers[start], e)
        seen = torch.arange(len(token_ids), device=rows.device)[None] <= rows[:, None]
        overwriter = _Overwriter(rows, into)
        self._run(
            token_ids[rows], layers, overwriter, attention_mask=seen[None, None], position_ids=rows[None]
        )

    def _run(self, token_ids: Tensor, layers: list[Any], recorder: Cache, **inputs: Tensor) -> None:
        """The decoder's own forward of `token_ids` over `layers`, until `recorder` has what it needs."""
        if token_ids.ndim != 1 or not len(token_ids):
            raise UsageError(f"token_ids must be [tokens], at least one, not {list(token_ids.shape)}")
        if self._decoder.training:
            raise UsageError(f"{_name(self.model)} is in training mode; call model.eval() first")
        view = _view(self._decoder, layers)
        ids = token_ids.to(self.device)[None]
        # The forward of the class: one on the instance (accelerate sets it) is bound to the user's module.
        forward = type(view).forward
        with torch.no_grad(), suppress(_GroupDone):
            forward(view, input_ids=ids, past_key_values=recorder, use_cache=True, **inputs)
            raise UsageError(f"{_name(self.model)} does not hand over K and V through Cache.update")

    def _cache(self, past: Sequence[KV], start: int, end: int) -> DynamicCache:
        if not past:
            return empty_cache(self.config)
        if len(past) != self.num_layers:
            raise UsageError(f"past has {len(past)} layers, the model has {self.num_layers}")
        # The model sizes masks and positions by whichever layer it likes, so all must report one length: the
        # group's first layer answers for those outside the group. These are views, so it costs nothing.
        layers = [past[i] if start <= i <= end else past[start] for i in range(self.num_layers)]
        return past_key_values(self.config, layers)

    def _check_group(self, tokens: int, start: int, end: int, e: Tensor | None) -> None:
        if not 0 <= start <= end < self.num_layers:
            raise UsageError(f"group [{start}, {end}] is not within layers 0..{self.num_layers - 1}")
        if (e is None) != (start == 0):
            raise UsageError(
                "a group that starts at layer 0 takes no E; any other needs the E of its first layer"
            )
        expected = [tokens, self.config.hidden_size]
        if e is not None and list(e.shape) != expected:
            raise UsageError(f"E must be [tokens, hidden] = {expected}, not {list(e.shape)}")


class _GroupDone(Exception):
    """The last layer of the group has its K and V."""


class _Recorder(Cache):  # type: ignore[misc]  # transformers is untyped
    """Fills `cache`, passes on what each layer adds to it, and ends the forward after layer `end`."""

    def __init__(self, cache: DynamicCache, end: int, on_layer: OnLayer | None) -> None:
        super().__init__(layers=cache.layers)
        self.inputs: dict[int, Tensor] = {}
        self._end = end
        self._on_layer = on_layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        e = self.inputs.pop(layer_idx, None)
        if self._on_layer is not None:
            # From what update returns: what it keeps may be less (a sliding window), and what it is given may
            # be a slice of a fused projection, which would then live as long as K and V.
            tokens = key_states.shape[-2]
            k, v = (states[0, :, -tokens:].transpose(0, 1) for states in (keys, values))
            self._on_layer(layer_idx, k, v, e)
        if layer_idx == self._end:
            raise _GroupDone
        return keys, values


class _Overwriter(Cache):  # type: ignore[misc]  # transformers is untyped
    """Writes what each layer adds over the `rows` of `into`, and ends the forward after the last layer."""

    def __init__(self, rows: Tensor, into: Sequence[KV]) -> None:
        super().__init__(layers=[])
        self._rows = rows
        self._into = into

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        return 0

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        k, v = self._into[layer_idx]
        k[self._rows] = key_states[0].transpose(0, 1)
        v[self._rows] = value_states[0].transpose(0, 1)
        if layer_idx == len(self._into) - 1:
            raise _GroupDone
        return k.transpose(0, 1)[None], v.transpose(0, 1)[None]


class _StandIn:
    """Takes the place of a layer in a view, and answers for it where the model reads its attributes."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _Skip(_StandIn):
    def __call__(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class _Enter(_StandIn):
    def __init__(self, layer: Any, e: Tensor) -> None:
        super().__init__(layer)
        self._e = e

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._layer(self._e.to(hidden_states)[None], *args, **kwargs)


class _Tap(_StandIn):
    def __init__(self, layer: Any, take: Callable[[Tensor], None]) -> None:
        super().__init__(layer)
        self._take = take

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._take(hidden_states[0])
        return self._layer(hidden_states, *args, **kwargs)


def _view(decoder: Any, layers: list[Any]) -> Any:
    """A shallow copy of `decoder` whose forward walks `layers`; everything else is shared."""
    view = copy.copy(decoder)
    # An attribute of the instance is found before the module registry, which the copy shares with the user's
    # module. The flag keeps transformers from installing its output hooks through the view: the user's module
    # would not know of them and install them again.
    vars(view).update(layers=layers, _output_capturing_hooks_installed=True)
    return view


def _inner_decoder(model: Any) -> Any:
    """The module that owns `layers` in a model, found through PEFT."""
    adapters = getattr(model, "peft_config", None) or {}
    if any(adapter.is_prompt_learning for adapter in adapters.values()):
        raise UsageError(f"{_name(model)} learns a prompt: its K and V are not of the request's tokens alone")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(base, "model", None)
    for part in ("layers", "embed_tokens", "config"):
        if not hasattr(decoder, part):
            raise UsageError(f"{_name(base)} has no `model.{part}`: not a decoder-only causal language model")
    return decoder


def _name(model: Any) -> str:
    return type(model).__name__
