"""Maps: what a sender's E, K and V look like when the receiver computes them, by ridge regression.

Beyond the paper, whose groups start from the sender's E as it is. Closed-form KV maps without recompute:
arXiv 2608.03893 and 2609.00891.

The file is safetensors: per map `e.<layer>` or `kv.<layer>` with `.weight` `[features, outputs]` and `.bias`
`[outputs]`, float32. The entry `droidspeak` of its metadata is JSON: format, kind of features, pair.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from droidspeak.errors import MapsUnusable, UsageError
from droidspeak.layerselect.mapfeatures import MapFeatures, e_features, kv_features
from droidspeak.layerselect.plan import Plan
from droidspeak.layerselect.policy import MapFile, Policy
from droidspeak.layerselect.ridge import LinearMap

__all__ = ["MapCache", "MapFeatures", "Maps"]

_FORMAT = "droidspeak-maps-1"
# Features are much wider than what is mapped: so many rows of them are in memory at a time.
_ROWS = 1024


@dataclass(frozen=True)
class Maps:
    """The maps of one ordered pair.

    Attributes:
        features: what they see of a token.
        e: by layer, `[features, hidden]`.
        kv: by layer, `[features, 2 * kv_heads * head_dim]`: un-rotated K, then V.
        pair: source ids of sender and receiver, if the maps know them.
    """

    features: MapFeatures
    e: Mapping[int, LinearMap]
    kv: Mapping[int, LinearMap]
    pair: tuple[str, str] | None = None

    @property
    def need_embeddings(self) -> bool:
        """Whether the maps read the receiver's embeddings."""
        return self.features is not MapFeatures.LINEAR

    def require(self, plan: Plan) -> None:
        """Raises `MapsUnusable` if `plan` maps a layer that has no map."""
        missing = [f"e.{layer}" for layer in plan.transition_layers if plan.map_e and layer not in self.e]
        missing += [f"kv.{layer}" for layer in plan.mapped if layer not in self.kv]
        if missing:
            raise MapsUnusable(f"plan {plan} needs maps that are not there: {', '.join(missing)}")

    def map_e(self, layer: int, e: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """E of `layer` as the receiver would have it.

        Args:
            e: the sender's, `[rows, hidden]`.
            embeddings: the receiver's, of all tokens up to the last row, `[tokens, hidden]`; not read if
                `need_embeddings` is false.

        Returns:
            `[rows, hidden]` in the dtype of `e`.

        Raises:
            MapsUnusable: no map of that layer, or one for another shape.
        """
        found = _find(self.e, "e", layer)
        mapped = [e.new_empty(0, e.shape[1])]
        for start in range(0, len(e), _ROWS):
            rows = e[start : start + _ROWS]
            x = e_features(self.features, rows, _up_to(embeddings, len(e) - start - len(rows)))
            mapped.append(_apply(found, x, f"e.{layer}", e.shape[1]).to(e.dtype))
        return torch.cat(mapped)

    def map_kv(
        self, layer: int, k: Tensor, v: Tensor, embeddings: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """K, un-rotated, and V of `layer` as the receiver would have them.

        Args:
            k: the sender's un-rotated keys, `[rows, kv_heads, head_dim]`.
            v: its values, of the same shape.
            embeddings: as in `map_e`.

        Returns:
            Both float32, of the same shapes.

        Raises:
            MapsUnusable: no map of that layer, or one for another shape.
        """
        found = _find(self.kv, "kv", layer)
        half = k[0].numel() if len(k) else 0
        mapped = [torch.empty(0, 2 * half, device=k.device)]
        for start in range(0, len(k), _ROWS):
            rows = slice(start, min(start + _ROWS, len(k)))
            x = kv_features(self.features, k[rows], v[rows], _up_to(embeddings, len(k) - rows.stop))
            mapped.append(_apply(found, x, f"kv.{layer}", 2 * half))
        together = torch.cat(mapped)
        return together[:, :half].reshape(k.shape), together[:, half:].reshape(v.shape)

    def to(self, device: torch.device | str) -> Maps:
        """The same maps on `device`."""
        e, kv = (
            {layer: LinearMap(one.weight.to(device), one.bias.to(device)) for layer, one in maps.items()}
            for maps in (self.e, self.kv)
        )
        return Maps(self.features, e, kv, self.pair)

    def save(self, path: Path) -> MapFile:
        """Writes the file, whole or not at all. Raises `UsageError` if it cannot be written."""
        header = {"format": _FORMAT, "features": self.features, "pair": self.pair}
        data = safetensors.save(self._tensors(), {"droidspeak": json.dumps(header, sort_keys=True)})
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError as error:
            raise UsageError(f"maps file {path} cannot be written: {error.strerror}") from None
        finally:
            temporary.unlink(missing_ok=True)
        return MapFile(path, hashlib.sha256(data).hexdigest())

    @classmethod
    def load(cls, file: MapFile) -> Maps:
        """Reads a file that `save` wrote.

        Raises:
            MapsUnusable: not there, other bytes than `file` names, another format, or not finite.
        """
        try:
            data = file.path.read_bytes()
        except OSError as error:
            raise MapsUnusable(f"maps file {file.path} cannot be read: {error.strerror}") from None
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise MapsUnusable(f"maps file {file.path} is not the one of the policy: its SHA-256 differs")
        try:
            return cls._parse(data)
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            raise MapsUnusable(f"maps file {file.path}: {error}") from None

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{kind}.{layer}.{name}": tensor.contiguous().cpu()
            for kind, maps in (("e", self.e), ("kv", self.kv))
            for layer, one in maps.items()
            for name, tensor in (("weight", one.weight), ("bias", one.bias))
        }

    @classmethod
    def _parse(cls, data: bytes) -> Maps:
        tensors = safetensors.load(data)
        header = _header(data)
        if header.get("format") != _FORMAT:
            raise ValueError(f"format {header.get('format')!r}; allowed is {_FORMAT}")
        found: dict[str, dict[int, LinearMap]] = {"e": {}, "kv": {}}
        for name in tensors:
            kind, layer, part = name.split(".")
            if part == "weight":
                found[kind][int(layer)] = _linear(tensors, f"{kind}.{layer}")
        pair = header["pair"]
        return cls(MapFeatures(header["features"]), found["e"], found["kv"], pair and (pair[0], pair[1]))


class MapCache:
    """Loads the maps of policies, each file once. Threads may share it.

    A file that cannot be used is not read again before it changes.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._lock = threading.Lock()
        self._held: dict[Path, tuple[MapFile, Maps]] = {}
        self._refused: dict[Path, tuple[MapFile, int, MapsUnusable]] = {}

    def get(self, policy: Policy) -> Maps:
        """The maps of `policy`. Raises `MapsUnusable`."""
        file = policy.maps
        if file is None:
            raise MapsUnusable("the policy has no maps")
        with self._lock:
            held = self._held.get(file.path)
            maps = held[1] if held and held[0] == file else self._load(file)
        if maps.pair not in (None, (policy.sender, policy.receiver)):
            raise MapsUnusable(f"maps file {file.path} is for another pair")
        return maps

    def _load(self, file: MapFile) -> Maps:
        changed = _changed(file.path)
        refused = self._refused.get(file.path)
        if refused and refused[:2] == (file, changed):
            raise refused[2]
        try:
            maps = Maps.load(file).to(self._device)
        except MapsUnusable as error:
            self._refused[file.path] = file, changed, error
            raise
        self._held[file.path] = file, maps
        return maps


def _changed(path: Path) -> int:
    """When the file last changed, nanoseconds; 0 if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _header(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["droidspeak"])
    return header


def _linear(tensors: Mapping[str, Tensor], name: str) -> LinearMap:
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    if weight.ndim != 2 or bias.shape != weight.shape[1:]:
        raise ValueError(f"{name} has weights {list(weight.shape)} and biases {list(bias.shape)}")
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise ValueError(f"{name} is not finite")
    return LinearMap(weight, bias)


def _find(maps: Mapping[int, LinearMap], kind: str, layer: int) -> LinearMap:
    if layer not in maps:
        raise MapsUnusable(f"there is no map {kind}.{layer}; there are {sorted(maps) or 'none'}")
    return maps[layer]


def _apply(found: LinearMap, x: Tensor, name: str, outputs: int) -> Tensor:
    wanted = [x.shape[1], outputs]
    if list(found.weight.shape) != wanted:
        raise MapsUnusable(f"map {name} is {list(found.weight.shape)}; this model needs {wanted}")
    return found(x)


def _up_to(embeddings: Tensor | None, left: int) -> Tensor | None:
    """Embeddings without those of the last `left` tokens."""
    return None if embeddings is None else embeddings[: len(embeddings) - left]
