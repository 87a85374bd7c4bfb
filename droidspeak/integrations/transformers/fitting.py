"""Fits maps: both models prefill the same prefixes; of what they have, only moments are kept."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from droidspeak.errors import UsageError
from droidspeak.integrations.transformers.decoder import Decoder
from droidspeak.integrations.transformers.partial import PrefixKV, capture
from droidspeak.integrations.transformers.rotary import DecoderRotary
from droidspeak.layerselect.mapfeatures import columns, e_features, kv_features
from droidspeak.layerselect.mapping import MapFeatures, Maps
from droidspeak.layerselect.ridge import LinearMap, RidgeFit

__all__ = ["MIN_TOKENS", "MapFitter", "fit_maps"]

MIN_TOKENS = 1000
"""Fewer calibration tokens than this fit no map."""


class MapFitter:
    """Fits maps from `sender` to `receiver`, of several kinds of features at once.

    The widest kind decides what it takes: 16 bytes per feature squared and map, on the receiver's device, and
    E maps see `2 * hidden` (`LINEAR`), `5 * hidden` (`EMBEDDING`) or 1,024 more features (`RANDOM`).

    Args:
        kinds: at least one.
        e_layers: layers whose E is mapped, all but the first by default.
        kv_layers: layers whose K and V are mapped, all by default.

    Attributes:
        tokens: calibration tokens so far.

    Raises:
        UsageError: models of different shapes, layers that they lack, or keys that cannot be un-rotated.
    """

    def __init__(
        self,
        sender: Decoder,
        receiver: Decoder,
        kinds: Collection[MapFeatures],
        *,
        e_layers: Collection[int] | None = None,
        kv_layers: Collection[int] | None = None,
    ) -> None:
        every = range(receiver.num_layers)
        self._sender, self._receiver = sender, receiver
        self._kinds = [kind for kind in MapFeatures if kind in kinds]
        self._e_layers = list(every[1:] if e_layers is None else e_layers)
        self._kv_layers = list(every if kv_layers is None else kv_layers)
        self._e_fits: dict[int, RidgeFit] = {}
        self._kv_fits: dict[int, RidgeFit] = {}
        self._rotaries = DecoderRotary(sender), DecoderRotary(receiver)
        self.tokens = 0
        self._check()

    def add(self, token_ids: Tensor) -> None:
        """Prefills `token_ids` (`[tokens]` int64, a prefix) with both models and adds what they have."""
        sent, own = (capture(side, token_ids, self._e_layers) for side in (self._sender, self._receiver))
        embeddings, kind = self._receiver.embed(token_ids), self._kinds[-1]
        for layer in self._e_layers:
            x = e_features(kind, sent.e(layer).to(embeddings), embeddings)
            _add(self._e_fits, layer, x, own.e(layer))
        for layer in self._kv_layers:
            (k, v), (own_k, own_v) = self._position_free(sent, own, layer)
            x = kv_features(kind, k.to(embeddings.device), v.to(embeddings), embeddings)
            _add(self._kv_fits, layer, x, torch.cat([own_k.flatten(1), own_v.flatten(1)], 1))
        self.tokens += len(token_ids)

    def solve(self, pair: tuple[str, str] | None = None) -> dict[MapFeatures, Maps]:
        """Maps of each kind, on the CPU.

        Args:
            pair: source ids of sender and receiver, to be written into the file.

        Raises:
            UsageError: fewer than `MIN_TOKENS` tokens, or a model whose E, K or V are not finite.
        """
        if self.tokens < MIN_TOKENS:
            raise UsageError(
                f"maps from {self.tokens} calibration tokens: allowed are {MIN_TOKENS:,} tokens or more"
            )
        return {
            kind: Maps(
                kind,
                {layer: self._solve(fit, kind, 2 * fit.outputs) for layer, fit in self._e_fits.items()},
                {layer: self._solve(fit, kind, fit.outputs) for layer, fit in self._kv_fits.items()},
                pair,
            ).to("cpu")
            for kind in self._kinds
        }

    def _solve(self, fit: RidgeFit, kind: MapFeatures, mapped: int) -> LinearMap:
        return fit.solve(columns(kind, mapped, self._receiver.config.hidden_size))

    def _position_free(self, sent: PrefixKV, own: PrefixKV, layer: int) -> list[tuple[Tensor, Tensor]]:
        sides = zip((sent, own), self._rotaries, strict=True)
        return [(rotary.unrotate(k, layer), v) for side, rotary in sides for k, v in [side.kv(layer)]]

    def _check(self) -> None:
        if not self._kinds:
            raise UsageError(f"no kind of features: allowed are {', '.join(MapFeatures)}")
        shapes = [(side.num_layers, side.config.hidden_size) for side in (self._sender, self._receiver)]
        if shapes[0] != shapes[1]:
            raise UsageError(f"maps between models of {shapes[0]} and {shapes[1]} layers and hidden size")
        layers = self._receiver.num_layers
        if unknown := sorted({*self._e_layers, *self._kv_layers} - set(range(layers))):
            raise UsageError(f"maps of layers {unknown}: the models have layers 0-{layers - 1}")
        for rotary in self._rotaries if self._kv_layers else ():
            rotary.verify()


def fit_maps(
    sender: Decoder,
    receiver: Decoder,
    prefixes: Iterable[Tensor],
    kinds: Collection[MapFeatures] = tuple(MapFeatures),
    *,
    e_layers: Collection[int] | None = None,
    kv_layers: Collection[int] | None = None,
    pair: tuple[str, str] | None = None,
) -> dict[MapFeatures, Maps]:
    """Maps of each kind, fitted on `prefixes` (each `[tokens]` int64); see `MapFitter`."""
    fitter = MapFitter(sender, receiver, kinds, e_layers=e_layers, kv_layers=kv_layers)
    for prefix in prefixes:
        fitter.add(prefix)
    return fitter.solve(pair)


def _add(fits: dict[int, RidgeFit], layer: int, x: Tensor, y: Tensor) -> None:
    if layer not in fits:
        fits[layer] = RidgeFit(x.shape[1], y.shape[1], x.device)
    fits[layer].add(x, y)
