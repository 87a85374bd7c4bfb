"""Every way to fill the cache of one prefix, at the least prefill.

One recompute of layers `[s .. e]` from the sender's E of layer s holds the K and V of every group that
starts at s and ends before e: all L(L+1)/2 contiguous groups cost L recompute runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, TypeAlias

from torch import Tensor

from droidspeak.errors import UsageError
from droidspeak.integrations.transformers.cacheblend import blend
from droidspeak.integrations.transformers.decoder import Decoder
from droidspeak.integrations.transformers.kv import KV
from droidspeak.integrations.transformers.mapped import mapped_source
from droidspeak.integrations.transformers.partial import capture
from droidspeak.layerselect import Action, CacheBlend, Method, Plan, ReuseOne
from droidspeak.layerselect.mapped import LayerSource
from droidspeak.layerselect.mapping import Maps
from droidspeak.layerselect.tasks import Timing

__all__ = ["Mixed", "Mixer"]

Mixed: TypeAlias = tuple[Method, Sequence[KV]]
"""A method, and K and V of every layer as it leaves them."""


class _Run(NamedTuple):
    """A recompute by the receiver from layer `start` on, from the sender's E, mapped or not."""

    start: int
    map_e: bool


class Mixer:
    """Fills the cache of one prefix by each of `methods`.

    Args:
        token_ids: `[tokens]` int64, the prefix.
        maps: needed by plans that map.

    Attributes:
        own: the receiver's full prefill.
        sent: the sender's, with E where a plan starts from it.
        runs: recompute runs so far: layers and tokens.
        timings: of those that were not taken from `own`.
        map_timings: of mapping K and V.

    Raises:
        UsageError: a plan that maps, without maps, or for another number of layers.
    """

    def __init__(
        self,
        sender: Decoder,
        receiver: Decoder,
        token_ids: Tensor,
        methods: Sequence[Method],
        maps: Maps | None = None,
    ) -> None:
        self._receiver, self._token_ids, self._methods = receiver, token_ids, list(methods)
        plans = [method for method in methods if isinstance(method, Plan)]
        _check(plans, receiver.num_layers, maps)
        self.sent = capture(sender, token_ids, {layer for plan in plans for layer in plan.transition_layers})
        blends = any(isinstance(method, CacheBlend) for method in methods)
        self.own = capture(receiver, token_ids, [1] if blends else ())
        self._mapped = mapped_source(self.sent, maps, receiver, token_ids) if maps else None
        self._kv: dict[int, KV] = {}
        self.runs: list[tuple[int, int]] = []
        self.timings: list[Timing] = []
        self.map_timings: list[Timing] = []

    def mixed(self) -> Iterator[list[Mixed]]:
        """The methods, those that share recompute runs together; a run lives as long as its methods' turn."""
        for needed, methods in groupby(sorted(self._methods, key=_needed_runs), _needed_runs):
            members = list(methods)
            runs = {run: self._run(run, members) for run in needed}
            yield [(method, self._mix(method, runs)) for method in members]

    def _run(self, run: _Run, methods: Sequence[Method]) -> Sequence[KV]:
        """Layers `run.start ..` as far as `methods` need them."""
        end = max(
            group.end
            for method in methods
            if isinstance(method, Plan)
            for group in method.groups
            if group.start == run.start
        )
        tokens = len(self._token_ids)
        self.runs.append((end - run.start + 1, tokens))
        if run.start == 0:
            return self.own.layers
        started = time.perf_counter()
        e = self._source(run.map_e).e(run.start)
        layers = self._receiver.recompute(self._token_ids, run.start, end, e=e)
        self.timings.append(Timing(end - run.start + 1, tokens, time.perf_counter() - started))
        return layers

    def _mix(self, method: Method, runs: Mapping[_Run, Sequence[KV]]) -> Sequence[KV]:
        if isinstance(method, CacheBlend):
            return blend(self._receiver, self._token_ids, self.sent, self.own, method.ratio)
        if isinstance(method, ReuseOne):
            layers = list(self.own.layers)
            layers[method.layer] = self.sent.layers[method.layer]
            return layers
        recomputed = {
            layer: runs[_run_of(method, group.start)][layer - group.start]
            for group in method.groups
            for layer in group
        }
        return [
            recomputed[layer] if action is Action.RECOMPUTE else self._loaded(layer, action)
            for layer, action in enumerate(method.actions)
        ]

    def _loaded(self, layer: int, action: Action) -> KV:
        if action is Action.REUSE:
            return self.sent.layers[layer]
        if layer not in self._kv:
            started = time.perf_counter()
            self._kv[layer] = self._source(mapped=True).kv(layer)
            self.map_timings.append(Timing(1, len(self._token_ids), time.perf_counter() - started))
        return self._kv[layer]

    def _source(self, mapped: bool) -> LayerSource:
        if not mapped:
            return self.sent
        assert self._mapped is not None
        return self._mapped


def _run_of(plan: Plan, start: int) -> _Run:
    return _Run(start, plan.map_e and start > 0)


def _needed_runs(method: Method) -> tuple[_Run, ...]:
    if not isinstance(method, Plan):
        return ()
    return tuple(_run_of(method, group.start) for group in method.groups)


def _check(plans: Sequence[Plan], layers: int, maps: Maps | None) -> None:
    for plan in plans:
        if plan.layers != layers:
            raise UsageError(f"plan of {plan.layers} layers for a model of {layers}")
        if plan.needs_maps and maps is None:
            raise UsageError(f"plan {plan} maps layers, and there are no maps")
