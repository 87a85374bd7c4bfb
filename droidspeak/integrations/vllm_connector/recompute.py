"""Partial prefill inside vLLM: the model's own layers run over a prefix, from the sender's E.

A forward context is nested in the engine's: metadata come from the layer's own backend and builder, so K
and V are written and attended to as in any prefill, chunk by chunk, whatever the architecture. Of a group's
last layer only K and V are needed, but its whole layer runs: that is the one form that all models share.
Layers of several of vLLM's tables may run in one group: each `Part` of it has its place for the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from droidspeak.integrations.vllm_connector.paging import slots_of
from droidspeak.integrations.vllm_connector.rotary import EngineRotary
from droidspeak.integrations.vllm_connector.tables import NULL_BLOCK

__all__ = ["Part", "PartialPrefill"]


@dataclass(frozen=True)
class Part:
    """Layers of a group that find the rows of a request at the same place.

    Attributes:
        block_ids: of the tokens from `origin` on, int64; in vLLM's pages or in others that are in use.
        origin: the first token that the layers may attend to.
        first: rows of tokens before it are there already, and are not written.
    """

    layers: tuple[int, ...]
    block_ids: Tensor
    block_size: int
    origin: int = 0
    first: int = 0

    def slots(self, start: int, end: int) -> Tensor:
        """Where the rows of the tokens `start .. end` are written, `[end - start]`, int64."""
        slots = slots_of(self.block_ids, start - self.origin, end - self.origin, self.block_size)
        known = max(0, self.first - start)
        slots[:known] = NULL_BLOCK * self.block_size + slots[:known] % self.block_size
        return slots


class PartialPrefill:
    """Runs groups of layers of the loaded model.

    Args:
        model: vLLM's, of the `model.model.layers` shape.
        attention: name and module of each layer's attention, by layer.
        budget: tokens of one forward.
    """

    def __init__(
        self, vllm_config: Any, model: Any, attention: Mapping[int, tuple[str, Any]], *, budget: int
    ) -> None:
        self._config, self._attention = vllm_config, attention
        self._layers, self._embed = model.model.layers, model.model.embed_input_ids
        self._adapters = getattr(model, "lora_manager", None)
        self._builders: dict[tuple[int, ...], Any] = {}
        self.budget = budget

    @cached_property
    def rotary(self) -> EngineRotary:
        """Of the layers. Raises `MapsUnusable`."""
        return EngineRotary(self._layers)

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """E of layer 0, `[tokens, hidden]`."""
        embedded: Tensor = self._embed(token_ids)
        return embedded

    @torch.inference_mode()
    def run(self, parts: Sequence[Part], e: Tensor, start: int, *, adapter: int = 0) -> None:
        """Runs the layers of `parts` over the tokens from `start` on; rows of the tokens before are there.

        Args:
            e: `[tokens, hidden]`, the input of the first layer; at most `budget` tokens.
            adapter: the request's LoRA in vLLM's numbers, one of the running batch; 0 for none.
        """
        from vllm.forward_context import set_forward_context

        tokens = e.shape[0]
        positions = torch.arange(start, start + tokens, device=e.device)
        metadata: dict[str, Any] = {}
        slots: dict[str, Tensor] = {}
        for part in parts:
            names = [self._attention[layer][0] for layer in part.layers]
            written = part.slots(start, start + tokens)
            built = self._builder(part).build(0, _common(part, positions, start + tokens, written))
            metadata |= dict.fromkeys(names, built)
            slots |= dict.fromkeys(names, written)
        context = set_forward_context(metadata, self._config, num_tokens=tokens, slot_mapping=slots)
        with context, self._adapted(adapter, tokens):
            hidden, residual = e.clone(), None
            for layer in sorted(layer for part in parts for layer in part.layers):
                hidden, residual = self._layers[layer](positions, hidden, residual)

    @contextmanager
    def _adapted(self, adapter: int, tokens: int) -> Iterator[None]:
        """Within it all rows are of `adapter`; around it, as the batch has them."""
        if self._adapters is None:
            yield
            return
        from vllm.lora.layers import LoRAMapping

        outer = self._adapters._last_mapping
        mapping = LoRAMapping((adapter,) * tokens, (adapter,), is_prefill=True)
        self._adapters.set_adapter_mapping(mapping)
        try:
            yield
        finally:
            if outer is not None:
                self._adapters.set_adapter_mapping(outer)

    def _builder(self, part: Part) -> Any:
        if part.layers not in self._builders:
            names = [self._attention[layer][0] for layer in part.layers]
            _, attention = self._attention[part.layers[0]]
            make = attention.get_attn_backend().get_builder_cls()
            spec = replace(attention.get_kv_cache_spec(self._config), block_size=part.block_size)
            self._builders[part.layers] = make(spec, names, self._config, attention.kv_cache.device)
        return self._builders[part.layers]


def _common(part: Part, positions: Tensor, end: int, slots: Tensor) -> Any:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    tokens, length = positions.numel(), end - part.origin
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(positions.device),
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([length], dtype=torch.int32, device=positions.device),
        num_reqs=1,
        num_actual_tokens=tokens,
        max_query_len=tokens,
        max_seq_len=length,
        block_table_tensor=part.block_ids[None].to(torch.int32),
        slot_mapping=slots,
        causal=True,
        positions=positions,
    )
