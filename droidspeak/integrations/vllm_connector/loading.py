"""One load on a worker: from the layer stream into the request's blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from droidspeak.connector import LayerStream
from droidspeak.integrations.vllm_connector.messages import LoadOrder
from droidspeak.integrations.vllm_connector.paging import PagedLayer, slots_of
from droidspeak.integrations.vllm_connector.recompute import PartialPrefill
from droidspeak.layerselect import Group, Plan
from droidspeak.layerselect.mapped import LayerSource, MappedSource
from droidspeak.layerselect.mapping import Maps

__all__ = ["Loading"]


class Loading:
    """Brings one order into the blocks, layer by layer or piece by piece.

    Exact rows come first: a recomputed group attends to them. `prefill` is needed where the plan recomputes.
    All methods raise `LoadFailed` when the stream has ended, and `MapsUnusable` when maps do not fit.

    Args:
        stream: of this rank's heads, or of all where the plan maps K and V.
        heads: this rank's among those of `stream`.
    """

    def __init__(
        self,
        order: LoadOrder,
        stream: LayerStream,
        layers: Mapping[int, PagedLayer],
        *,
        block_size: int,
        device: torch.device,
        heads: slice,
    ) -> None:
        self.order, self.stream = order, stream
        self._layers, self._block_size, self._heads = layers, block_size, heads
        self._mapped: LayerSource = stream
        self._mapped_e: dict[int, Tensor] = {}
        self._blocks = torch.tensor(order.block_ids, dtype=torch.int64, device=device)
        self._plan = order.match.plan or Plan.recompute(len(layers), ())
        self._exact = order.match.exact_tokens
        self._begin = max(order.first, self._exact)
        self._left = list(self._plan.loaded)
        self._cursor = self._begin

    @property
    def recomputes(self) -> bool:
        """Whether there is anything to recompute."""
        return bool(self._plan.groups) and self.order.match.shared_tokens > 0

    @property
    def blocks(self) -> Tensor:
        """Blocks that this writes to, which may hold anything if it has failed; int64."""
        return self._blocks[self.order.first // self._block_size :]

    @property
    def needs_maps(self) -> bool:
        """Whether `map_by` must still be called before anything is brought into the blocks."""
        return self._plan.needs_maps and self._mapped is self.stream

    def map_by(self, maps: Maps, prefill: PartialPrefill) -> None:
        """Maps what the plan says by `maps`. Raises `MapsUnusable`."""
        maps.require(self._plan)
        ids = torch.tensor(self.order.token_ids, device=self._blocks.device)
        mapped = MappedSource(self.stream, maps, prefill.rotary, lambda: prefill.embed(ids), self._exact)
        # All ranks embed together, so they do it now, and not when they come to a layer.
        _ = mapped.embeddings
        self._mapped = mapped

    def await_recompute(self) -> None:
        """Waits for all that the recomputed groups need."""
        for group in self._plan.groups if self.recomputes else ():
            if group.start > 0:
                self.stream.e(group.start)
            if self.order.first < self._exact:
                for layer in group:
                    self.stream.kv(layer)

    def deliver(self, layer: int) -> None:
        """Writes the rows of a layer that is not recomputed; waits for them."""
        if layer in self._left:
            self._write(layer, self.order.end)
            self._left.remove(layer)

    def recompute(self, prefill: PartialPrefill) -> None:
        """Recomputes all groups over all shared tokens."""
        for group in self._plan.groups if self.recomputes else ():
            self._before(group)
            for start in range(self._begin, self.order.end, prefill.budget):
                self._run(prefill, group, start, min(start + prefill.budget, self.order.end))

    def ready(self, timeout: float) -> bool:
        """Whether `advance` would not wait; gives it `timeout` seconds to become so."""
        if not self._recomputing:
            return self.stream.ready(self._left[:1], timeout=timeout)
        needed = [layer for group in self._plan.groups for layer in group if self.order.first < self._exact]
        return self.stream.ready(needed, self._plan.transition_layers, timeout=timeout)

    def advance(self, prefill: PartialPrefill | None) -> bool:
        """Does the next piece of work, at most one forward's; whether there is more."""
        if self._recomputing and prefill is not None:
            self._advance_recompute(prefill)
        elif self._left:
            self.deliver(self._left[0])
        return bool(self._left) or self._recomputing

    @property
    def _recomputing(self) -> bool:
        return self.recomputes and self._cursor < self.order.end

    def _advance_recompute(self, prefill: PartialPrefill) -> None:
        # All groups of one piece: a later group's layers attend only to their own earlier rows.
        stop = min(self._cursor + prefill.budget, self.order.end)
        for group in self._plan.groups:
            if self._cursor == self._begin:
                self._before(group)
            self._run(prefill, group, self._cursor, stop)
        self._cursor = stop

    def _before(self, group: Group) -> None:
        for layer in group:
            self._write(layer, self._exact)

    def _run(self, prefill: PartialPrefill, group: Group, start: int, stop: int) -> None:
        e = self._e(prefill, group.start, start, stop)
        prefill.run(list(group), e, start, self._blocks, adapter=self.order.adapter)

    def _e(self, prefill: PartialPrefill, layer: int, start: int, stop: int) -> Tensor:
        if layer == 0:
            ids = torch.tensor(self.order.token_ids[start:stop], device=self._blocks.device)
            return prefill.embed(ids)
        return self._transition_e(layer)[start - self._exact : stop - self._exact].to(self._blocks.device)

    def _transition_e(self, layer: int) -> Tensor:
        if not self._plan.map_e:
            return self.stream.e(layer)
        if layer not in self._mapped_e:
            self._mapped_e[layer] = self._mapped.e(layer)
        return self._mapped_e[layer]

    def _write(self, layer: int, end: int) -> None:
        start = self.order.first
        if start < end:
            source = self._mapped if layer in self._plan.mapped else self.stream
            k, v = (rows[start:end, self._heads] for rows in source.kv(layer))
            self._layers[layer].write(k, v, slots_of(self._blocks, start, end, self._block_size))
