"""Partial prefill inside vLLM: the model's own layers run over a prefix, from the sender's E.

A forward context is nested in the engine's: metadata come from the layer's own backend and builder, so K
and V are written and attended to as in any prefill, chunk by chunk, whatever the architecture. Of a group's
last layer only K and V are needed, but its whole layer runs: that is the one form that all models share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from droidspeak.integrations.vllm_connector.paging import slots_of
from droidspeak.integrations.vllm_connector.rotary import EngineRotary

__all__ = ["PartialPrefill"]


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
        self._block_size = vllm_config.cache_config.block_size
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
    def run(
        self, layers: Sequence[int], e: Tensor, start: int, block_ids: Tensor, *, adapter: int = 0
    ) -> None:
        """Runs `layers` over the tokens from `start` on; `layers` of the tokens before are in the blocks.

        Args:
            e: `[tokens, hidden]`, the input of the first of `layers`; at most `budget` tokens.
            block_ids: of the request's tokens from 0 on, int64.
            adapter: the request's LoRA in vLLM's numbers, one of the running batch; 0 for none.
        """
        from vllm.forward_context import set_forward_context

        end = start + e.shape[0]
        positions = torch.arange(start, end, device=e.device)
        slots = slots_of(block_ids, start, end, self._block_size)
        metadata = self._builder(layers).build(0, self._common(positions, slots, block_ids))
        names = [self._attention[layer][0] for layer in layers]
        context = set_forward_context(
            dict.fromkeys(names, metadata),
            self._config,
            num_tokens=end - start,
            slot_mapping=dict.fromkeys(names, slots),
        )
        with context, self._adapted(adapter, end - start):
            hidden, residual = e.clone(), None
            for layer in layers:
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

    def _common(self, positions: Tensor, slots: Tensor, block_ids: Tensor) -> Any:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        tokens, end = positions.numel(), int(positions[-1]) + 1
        starts = torch.tensor([0, tokens], dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts.to(positions.device),
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor([end], dtype=torch.int32, device=positions.device),
            num_reqs=1,
            num_actual_tokens=tokens,
            max_query_len=tokens,
            max_seq_len=end,
            block_table_tensor=block_ids[None].to(torch.int32),
            slot_mapping=slots,
            causal=True,
            positions=positions,
        )

    def _builder(self, layers: Sequence[int]) -> Any:
        key = tuple(layers)
        if key not in self._builders:
            _, attention = self._attention[key[0]]
            names = [self._attention[layer][0] for layer in key]
            make = attention.get_attn_backend().get_builder_cls()
            spec = attention.get_kv_cache_spec(self._config)
            self._builders[key] = make(spec, names, self._config, attention.kv_cache.device)
        return self._builders[key]
