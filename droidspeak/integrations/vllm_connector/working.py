"""A worker's half: loads into the paged cache, recomputes, and copies what is to be kept.

Within a step (`sync`): E and exact rows are awaited before the forward, groups are recomputed, and each
other layer is awaited just before the forward comes to it. Between steps (`async`): one piece of work per
step, so that other requests' decoding is held up for one piece at most.

A load that fails leaves blocks that may hold anything. They are reported in the same step, vLLM computes them
anew, and what this step made of them is thrown away. An engine of several tables, or with windows, computes
all of the request anew, and can do that between steps only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from droidspeak.connector import Connector, Reason
from droidspeak.connector.shards import Shard
from droidspeak.errors import Incompatible, LoadFailed, MapsUnusable
from droidspeak.integrations.vllm_connector.attach import model_of
from droidspeak.integrations.vllm_connector.loading import Loading
from droidspeak.integrations.vllm_connector.messages import LoadOrder, LoadReport, Reports, StepOrders
from droidspeak.integrations.vllm_connector.paging import PagedLayer
from droidspeak.integrations.vllm_connector.recompute import PartialPrefill
from droidspeak.integrations.vllm_connector.saving import EPages, Saver, captured_layers
from droidspeak.integrations.vllm_connector.tables import BlockTable, keeps_all, tables_by_layer
from droidspeak.layerselect.mapping import MapCache
from droidspeak.storage.tier import TierQueue

__all__ = ["WorkerHalf"]

_log = logging.getLogger(__name__)
T = TypeVar("T")

_PATIENCE = 0.002  # seconds that a step waits for a load between steps: without, an idle engine would spin


class WorkerHalf:
    """Serves one vLLM worker.

    Args:
        agree: of this rank's "it goes well" and that of all others, whether it goes well everywhere; ranks
            recompute together or not at all.
    """

    def __init__(
        self,
        vllm_config: Any,
        kv_cache_config: Any,
        connector: Connector,
        agree: Callable[[bool], bool],
    ) -> None:
        self._config, self._connector, self._agree = vllm_config, connector, agree
        self._tables = tables_by_layer(kv_cache_config)
        self._by_blocks = keeps_all(kv_cache_config)
        self._layers: dict[int, PagedLayer] = {}
        self._prefill: PartialPrefill | None = None
        self._maps = MapCache()
        self._saver: Saver | None = None
        self._now: list[Loading] = []
        self._background: list[Loading] = []
        self._reports = Reports()
        self._broken: set[int] = set()
        self._received: set[str] = set()
        self._lost: set[str] = set()  # of those received, where vLLM must start anew
        self._failed: set[str] = set()  # requests whose load within this step has failed
        self._nested = False

    def register(self, caches: Mapping[str, torch.Tensor]) -> None:
        """Takes the paged caches, by vLLM's names of layers."""
        modules = self._config.compilation_config.static_forward_context
        names = _names_by_layer(self._config, caches.keys() & self._tables.keys())
        attention = {layer: (name, modules[name]) for layer, name in sorted(names.items())}
        bare = {
            layer: PagedLayer(module, caches[name], self._tables[name])
            for layer, (name, module) in attention.items()
        }
        measured = _measured(bare)
        self._layers = measured or bare
        self._maps = MapCache(next(iter(self._layers.values())).device)
        if measured is not None:
            pages = _e_pages(self._config, caches, self._tables)
            self._saver = Saver(
                self._connector, measured, pages, backlog=self._connector.options.save_backlog
            )
        if (model := model_of(self._config)) is not None:
            budget = self._config.scheduler_config.max_num_batched_tokens
            self._prefill = PartialPrefill(self._config, model, attention, budget=budget)

    # Before and within the forward

    def start(self, orders: StepOrders) -> None:
        """Begins loads; recomputes for those of this step; goes on with those between steps."""
        for order in orders.loads:
            loading = self._begin(order)
            if order.background:
                self._background.append(loading)
            else:
                self._now.append(loading)
                with self._failing(loading):
                    self._map(loading)
                    self._prepare(loading)
                    self._recompute(loading)
        self._advance()

    def _begin(self, order: LoadOrder) -> Loading:
        device = next(iter(self._layers.values())).device
        shard, heads = self._heads_for(order)
        plan = order.match.plan
        # What is mapped is mapped where the layers are.
        wanted = device if plan is not None and plan.needs_maps else "cpu"
        loading = Loading(
            order,
            self._connector.load(order.match, wanted, shard=shard),
            self._layers,
            device=device,
            heads=heads,
        )
        if self._saver is not None:
            self._saver.loading(loading)
        return loading

    def _heads_for(self, order: LoadOrder) -> tuple[Shard, slice]:
        """The shard to load, and where this rank's heads are in it: maps see all heads of a token."""
        mine, plan, receiver = self._connector.shard, order.match.plan, order.match.receiver
        assert receiver is not None, "a match with chunks has a receiver"
        heads = mine.heads(receiver.architecture.kv_heads)
        if plan is not None and plan.mapped:
            return Shard(0, 1), slice(heads.start, heads.stop)
        return mine, slice(None)

    def _map(self, loading: Loading) -> None:
        """Gets maps ready, on all ranks or on none."""
        policy = loading.order.match.policy
        if loading.needs_maps and policy is not None:
            maps = self._together(lambda: (self._maps.get(policy), self._ready_prefill().rotary)[0])
            loading.map_by(maps, self._ready_prefill())

    def _prepare(self, loading: Loading) -> None:
        """Waits for what is recomputed from, on all ranks or on none."""
        if loading.recomputes:
            self._together(lambda: loading.await_recompute(self._ready_prefill().budget))

    def _recompute(self, loading: Loading) -> None:
        if loading.recomputes:
            self._nested = True
            try:
                loading.recompute(self._ready_prefill())
            finally:
                self._nested = False

    def _ready_prefill(self) -> PartialPrefill:
        if self._prefill is None:
            raise LoadFailed(Reason.STORE_UNAVAILABLE, "the model is not known: is the vLLM plug-in loaded?")
        return self._prefill

    def _together(self, work: Callable[[], T]) -> T:
        """Does `work`, and fails if it fails on any rank: all go the same way, or collectives never meet."""
        failure: LoadFailed | MapsUnusable | None = None
        try:
            done = work()
        except (LoadFailed, MapsUnusable) as error:
            failure = error
        if self._agree(failure is None):
            return done
        raise failure or LoadFailed(Reason.STORE_UNAVAILABLE, "another rank could not load its part")

    def wait(self, layer_name: str) -> None:
        """Delivers a layer of all loads of this step, just before the forward comes to it."""
        if self._nested or not self._now:
            return
        from vllm.model_executor.models.utils import extract_layer_index

        layer = extract_layer_index(layer_name)
        for loading in list(self._now):
            with self._failing(loading):
                loading.deliver(layer)

    def _advance(self) -> None:
        patience = _PATIENCE
        for loading in self._background:
            if self._agree(loading.ready(patience)):
                break
            patience = 0.0
        else:
            return
        with self._failing(loading):
            self._map(loading)
            self._prepare(loading)
            if not self._together(lambda: self._piece(loading)):
                self._end(loading)

    def _piece(self, loading: Loading) -> bool:
        prefill = self._ready_prefill() if loading.recomputes else None
        self._nested = True
        try:
            return loading.advance(prefill)
        finally:
            self._nested = False

    # After the forward

    def save(self, orders: StepOrders) -> None:
        """Copies what `orders` keep, and ends the loads of this step."""
        self._end_delivered()
        loaded = {order.request_id for order in orders.loads if not order.background}
        for order in orders.saves if self._saver else ():
            # What was computed over blocks of a load that failed, on whichever rank, is wrong on all.
            if order.request_id not in loaded or self._agree(order.request_id not in self._failed):
                self._saver.keep(order)  # type: ignore[union-attr]
        self._failed.clear()

    def _end_delivered(self) -> None:
        for loading in list(self._now):
            self._end(loading)

    def finished(self, over: Collection[str]) -> set[str]:
        """Requests whose load between steps has ended since the last call, well or not.

        Args:
            over: requests that are over; of those given up while they were loaded, vLLM gets the blocks back.
        """
        for loading in [loading for loading in self._background if loading.order.request_id in over]:
            self._end(loading)
        received, self._received = self._received, set()
        return received

    def lost(self) -> set[str]:
        """Of those that `finished` has told, the ones that must start anew."""
        lost, self._lost = self._lost, set()
        return lost

    def broken_blocks(self) -> set[int]:
        """Blocks of loads that have failed since the last call."""
        broken, self._broken = self._broken, set()
        return broken

    def reports(self) -> Reports | None:
        """How loads ended since the last call."""
        # With E captured, vLLM asks before it has all saved.
        self._end_delivered()
        reports, self._reports = self._reports, Reports()
        return reports if reports.loads else None

    @property
    def saving(self) -> TierQueue | None:
        """What waits to be saved; `None` if this worker cannot save."""
        return self._saver.waiting if self._saver is not None else None

    def close(self) -> None:
        """Ends all loads, and waits for what is being saved."""
        for loading in (*self._now, *self._background):
            loading.stream.close()
        if self._saver is not None:
            self._saver.close()

    @contextmanager
    def _failing(self, loading: Loading) -> Iterator[None]:
        try:
            yield
        except (LoadFailed, MapsUnusable) as error:
            _log.warning("request %s is prefilled: %s", loading.order.request_id, error)
            if self._by_blocks:
                (table,) = {layer.table for layer in self._layers.values()}
                self._broken.update(loading.blocks(table).tolist())
            else:
                self._lost.add(loading.order.request_id)
            self._end(loading, _reason(error))

    def _end(self, loading: Loading, failure: Reason | None = None) -> None:
        loading.stream.close()
        if loading in self._now:
            self._now.remove(loading)
            if failure is not None:
                self._failed.add(loading.order.request_id)
        if loading in self._background:
            self._background.remove(loading)
            self._received.add(loading.order.request_id)
        report = LoadReport(loading.stream.bytes_loaded, loading.stream.wait_seconds, failure)
        self._reports.loads[loading.order.request_id] = report


def _reason(error: LoadFailed | MapsUnusable) -> Reason:
    return Reason(error.reason) if isinstance(error, LoadFailed) else Reason.MAPS_UNUSABLE


_E_LAYER = "cache_only_layers"


def _names_by_layer(vllm_config: Any, cached: Collection[str]) -> dict[int, str]:
    """The names of the model's own layers, by number, as far as they are `cached`.

    A draft model's come after them, with the same numbers or with ones beyond.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    count = vllm_config.model_config.get_total_num_hidden_layers()
    names: dict[int, str] = {}
    for name in vllm_config.compilation_config.static_forward_context:
        if name in cached and not name.startswith(_E_LAYER):
            names.setdefault(extract_layer_index(name), name)
    return {layer: name for layer, name in names.items() if layer < count}


def _measured(bare: Mapping[int, PagedLayer]) -> dict[int, PagedLayer] | None:
    """The layers, each with the order of its kind; `None` if that cannot be found out."""
    try:
        orders = {layer.kind: layer.measure() for layer in {one.kind: one for one in bare.values()}.values()}
    except Incompatible as error:
        _log.warning("%s", error)
        return None
    return {number: layer.ordered(orders[layer.kind]) for number, layer in bare.items()}


def _e_pages(
    vllm_config: Any, caches: Mapping[str, torch.Tensor], tables: Mapping[str, BlockTable]
) -> EPages | None:
    """The pages that `extract_hidden_states` fills, and the layers whose input they hold."""
    name = next((name for name in caches if name.startswith(_E_LAYER)), None)
    layers = captured_layers(vllm_config)
    return EPages(caches[name], layers, tables[name]) if layers and name is not None else None
