"""One load on a worker: from the layer stream into the request's blocks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

from droidspeak.connector import LayerStream
from droidspeak.integrations.vllm_connector.messages import LoadOrder
from droidspeak.integrations.vllm_connector.paging import PagedLayer, slots_of
from droidspeak.integrations.vllm_connector.recompute import Part, PartialPrefill
from droidspeak.integrations.vllm_connector.tables import BlockTable, live_from
from droidspeak.integrations.vllm_connector.windows import WindowPages
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
        device: torch.device,
        heads: slice,
    ) -> None:
        self.order, self.stream = order, stream
        self._layers, self._heads, self._device = layers, heads, device
        self._mapped: LayerSource = stream
        self._mapped_e: dict[int, Tensor] = {}
        self._tables = [torch.tensor(ids, dtype=torch.int64, device=device) for ids in order.tables]
        self._plan = order.match.plan or Plan.recompute(len(layers), ())
        self._exact = order.match.exact_tokens
        self._left = list(self._plan.loaded)
        self._starts: dict[BlockTable, int] = {}
        self._windows: dict[int, WindowPages] = {}
        # The window before a recomputed token must be there in every layer. What vLLM's own prefix cache has
        # found of it need not be: it keeps the window before the end. So they begin where the chunks do.
        self._begin = self._exact if self._windowed else max(order.first, self._exact)
        self._cursor = self._begin

    @property
    def recomputes(self) -> bool:
        """Whether there is anything to recompute."""
        return bool(self._plan.groups) and self.order.match.shared_tokens > 0

    def blocks(self, table: BlockTable) -> Tensor:
        """Blocks of a table that this writes to, which may hold anything if it has failed; int64."""
        size = table.block_size
        return self._tables[table.index][self._start(table) // size : -(-self.order.end // size)]

    @property
    def needs_maps(self) -> bool:
        """Whether `map_by` must still be called before anything is brought into the blocks."""
        return self._plan.needs_maps and self._mapped is self.stream

    def map_by(self, maps: Maps, prefill: PartialPrefill) -> None:
        """Maps what the plan says by `maps`. Raises `MapsUnusable`."""
        maps.require(self._plan)
        ids = torch.tensor(self.order.token_ids, device=self._device)
        mapped = MappedSource(self.stream, maps, prefill.rotary, lambda: prefill.embed(ids), self._exact)
        # All ranks embed together, so they do it now, and not when they come to a layer.
        _ = mapped.embeddings
        self._mapped = mapped

    def await_recompute(self, budget: int) -> None:
        """Waits for all that the recomputed groups need; from then on nothing can fail on one rank alone.

        Args:
            budget: tokens of a forward.
        """
        for group in self._plan.groups if self.recomputes else ():
            if group.start > 0:
                self.stream.e(group.start)
        for layer in self._needed:
            self.stream.kv(layer)
        for layer in self._windowed if self._recomputing else ():
            if layer not in self._windows:
                self._windows[layer] = WindowPages(self._layers[layer], self._begin, budget)

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
        return self.stream.ready(self._needed, self._plan.transition_layers, timeout=timeout)

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

    @property
    def _windowed(self) -> list[int]:
        """Layers that are recomputed and have a window."""
        groups = self._plan.groups if self.recomputes else ()
        layers = (layer for group in groups for layer in group)
        return [layer for layer in layers if self._layers[layer].table.window is not None]

    @property
    def _needed(self) -> list[int]:
        """Layers whose exact rows a recompute attends to and that are not in the blocks yet."""
        if not self.recomputes or self._exact == 0:
            return []
        if self.order.first >= self._exact:
            return self._windowed
        return [layer for group in self._plan.groups for layer in group]

    def _advance_recompute(self, prefill: PartialPrefill) -> None:
        # All groups of one piece: a later group's layers attend only to their own earlier rows.
        stop = min(self._cursor + prefill.budget, self.order.end)
        for group in self._plan.groups:
            if self._cursor == self._begin:
                self._before(group)
            self._run(prefill, group, self._cursor, stop)
        self._cursor = stop
        if not self._recomputing:
            self._windows.clear()

    def _before(self, group: Group) -> None:
        for layer in group:
            self._write(layer, self._exact)
            if (own := self._windows.get(layer)) is not None:
                self._put(own.layer, layer, own.block_ids, own.origin, own.origin, self._exact)

    def _run(self, prefill: PartialPrefill, group: Group, start: int, stop: int) -> None:
        e = self._e(prefill, group.start, start, stop)
        windows = {layer: self._windows[layer] for layer in group if layer in self._windows}
        with ExitStack() as stack:
            for own in windows.values():
                own.move(start)
                stack.enter_context(own.layer.in_use())
            prefill.run(self._parts(group), e, start, adapter=self.order.adapter)
        for layer, own in windows.items():
            table = self._layers[layer].table
            own.hand_over(self._tables[table.index], max(start, self._start(table)), stop)

    def _parts(self, group: Group) -> list[Part]:
        by_table: dict[BlockTable, list[int]] = {}
        for layer in group:
            by_table.setdefault(self._layers[layer].table, []).append(layer)
        return [self._part(table, tuple(layers)) for table, layers in by_table.items()]

    def _part(self, table: BlockTable, layers: tuple[int, ...]) -> Part:
        if table.window is None:
            return Part(layers, self._tables[table.index], table.block_size, first=self.order.first)
        own = self._windows[layers[0]]
        return Part(layers, own.block_ids, table.block_size, origin=own.origin)

    def _e(self, prefill: PartialPrefill, layer: int, start: int, stop: int) -> Tensor:
        if layer == 0:
            ids = torch.tensor(self.order.token_ids[start:stop], device=self._device)
            return prefill.embed(ids)
        return self._transition_e(layer)[start - self._exact : stop - self._exact].to(self._device)

    def _transition_e(self, layer: int) -> Tensor:
        if not self._plan.map_e:
            return self.stream.e(layer)
        if layer not in self._mapped_e:
            self._mapped_e[layer] = self._mapped.e(layer)
        return self._mapped_e[layer]

    def _start(self, table: BlockTable) -> int:
        """The first token whose rows go into a table's blocks."""
        if table not in self._starts:
            blocks = self.order.tables[table.index][: -(-self.order.end // table.block_size)]
            self._starts[table] = max(self.order.first, live_from(blocks, table.block_size))
        return self._starts[table]

    def _write(self, layer: int, end: int) -> None:
        paged = self._layers[layer]
        start = self._start(paged.table)
        self._put(paged, layer, self._tables[paged.table.index], 0, start, end)

    def _put(
        self, paged: PagedLayer, layer: int, block_ids: Tensor, origin: int, start: int, end: int
    ) -> None:
        """Writes rows of the tokens `start .. end` into blocks of the tokens from `origin` on."""
        if start < end:
            source = self._mapped if layer in self._plan.mapped else self.stream
            k, v = (rows[start:end, self._heads] for rows in source.kv(layer))
            slots = slots_of(block_ids, start - origin, end - origin, paged.table.block_size)
            paged.write(k, v, slots)
