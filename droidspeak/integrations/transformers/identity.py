"""Whose cache will this be? The identity of a model that is loaded in this process.

Weights are identified by the folder they came from, if the caller vouches for it, else by their bytes in
memory. Adapters are always identified by their bytes: which one is active can change between two requests.

Changes are noticed before each request, without reading all weights: torch counts the in-place changes of
each tensor, and a few values of each are compared besides, because PEFT merges and unmerges behind that
count's back (`.data`). Weights that no longer are what their folder says have no identity: the model neither
shares nor saves. What no sample can show is a change through `.data` of a few single values; after that,
make a new `ModelIdentity`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from droidspeak.errors import UnknownIdentity
from droidspeak.logs import limited
from droidspeak.storage import Architecture, SourceManifest
from droidspeak.storage.codecs import as_bytes
from droidspeak.storage.identity import tokenizer_digest, weights_digest

__all__ = ["ModelIdentity", "manifest_of"]

_log = limited(logging.getLogger(__name__))

_SAMPLE = 64
_REMEMBERED = 32
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")
_WRAPPED = ("base_layer", "original_module")
# What an adapter's configuration says beside how it changes the model.
_INCIDENTAL = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")


def manifest_of(model: Any, folder: Path | str | None = None) -> SourceManifest:
    """The manifest of a loaded model.

    Args:
        model: PreTrainedModel, or PeftModel: base and active adapters make one source.
        folder: where base weights and tokenizer were loaded from, unchanged. Without it the weights
            are hashed in memory and prompts are taken to be token ids.

    Raises:
        UnknownIdentity: the folder or the configuration does not identify the model.
    """
    return ModelIdentity(model, folder).identify()


class ModelIdentity:
    """Follows a model through changes of its weights and adapters.

    Args:
        folder: see `manifest_of`; the weights count as the folder's as they are now, on their device.
    """

    def __init__(self, model: Any, folder: Path | str | None = None) -> None:
        self._model, self._folder = model, None if folder is None else Path(folder)
        self._given = _fingerprint(_Parts.of(model).base)
        self._digests: dict[bytes, str] = {}
        self._known: dict[object, SourceManifest | None] = {}

    def manifest(self) -> SourceManifest | None:
        """The manifest of the model as it is now; `None` if it cannot be identified."""
        parts = _Parts.of(self._model)
        state = (_fingerprint(parts.base), _fingerprint(parts.active), parts.settings, parts.autocast)
        known = self._known
        if state in known:
            return known[state]
        manifest = self._identify_or_warn()
        # Replaced, never emptied: another thread that looks at the old one still finds what it saw.
        self._known = {**(known if len(known) < _REMEMBERED else {}), state: manifest}
        return manifest

    def identify(self) -> SourceManifest:
        """The manifest of the model as it is now. Raises `UnknownIdentity`."""
        parts = _Parts.of(self._model)
        if parts.autocast:
            raise UnknownIdentity("under autocast a model computes in another dtype than its own")
        if parts.unmerges:
            raise UnknownIdentity("a merged adapter is switched off: its next forward changes the weights")
        architecture = Architecture.from_config(parts.model.config.to_dict(), str(parts.model.dtype))
        return SourceManifest(
            weights=self._weights(parts),
            architecture=architecture,
            tokenizer=self._tokenizer(architecture.vocab_size),
            adapter=self._adapter(parts),
        )

    def _identify_or_warn(self) -> SourceManifest | None:
        try:
            return self.identify()
        except UnknownIdentity as error:
            _log.warning("no sharing and no saving: %s", error)
            return None

    def _weights(self, parts: _Parts) -> str:
        fingerprint = _fingerprint(parts.base)
        # Merged or quantised weights are not the folder's: only their bytes tell what they are.
        quantised = getattr(parts.model, "hf_quantizer", None) is not None
        if self._folder is None or parts.merged or quantised:
            return f"memory:{self._remembered(fingerprint, parts)}"
        if fingerprint != self._given:
            raise UnknownIdentity(f"weights are no longer those of {self._folder}")
        return self._folder_digest

    @cached_property
    def _folder_digest(self) -> str:
        """Of what the folder held when it was first asked for: what is written there later is not loaded."""
        assert self._folder is not None
        return weights_digest(self._folder)

    def _remembered(self, fingerprint: bytes, parts: _Parts) -> str:
        """The digest of the base weights, which are large and change less often than adapters do."""
        digests = self._digests
        if fingerprint not in digests:
            self._digests = digests = {fingerprint: _digest(parts.stored_base())}
        return digests[fingerprint]

    def _tokenizer(self, vocab_size: int) -> str:
        return f"ids:{vocab_size}" if self._folder is None else tokenizer_digest(self._folder, vocab_size)

    def _adapter(self, parts: _Parts) -> str | None:
        if not parts.active:
            return None
        configs = [_configuration(self._model.peft_config[name]) for name in parts.adapters]
        about = json.dumps([configs, parts.settings])
        return hashlib.sha256((about + _digest(parts.active.items())).encode()).hexdigest()


@dataclass(frozen=True)
class _Parts:
    """A model taken apart: base weights, and what PEFT adds to them now.

    Attributes:
        model: without PEFT's wrapper.
        base: parameters under the names that they have without PEFT.
        active: parameters of adapters that take part in a forward, adapters named by position.
        adapters: their names.
        settings: of each PEFT layer, by name: whether it is merged, and its active adapters' scaling.
        merged: an adapter is merged into the base weights.
        unmerges: a merged adapter is switched off; PEFT then changes the weights in the next forward.
    """

    model: Any
    base: Mapping[str, Tensor]
    active: Mapping[str, Tensor]
    adapters: tuple[str, ...]
    settings: tuple[tuple[str, bool, tuple[float, ...]], ...]
    merged: bool
    unmerges: bool

    @classmethod
    def of(cls, model: Any) -> _Parts:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        wrappers = _wrappers(inner)
        base, active = {}, {}
        for name, tensor in inner.named_parameters():
            if (owner := _owner(name, wrappers)) is None:
                base[_plain(name)] = tensor
            elif (used := _used_as(name, owner, wrappers[owner])) is not None:
                active[used] = tensor
        on = {name: module for name, module in wrappers.items() if not module.disable_adapters}
        merged = [name for name, module in wrappers.items() if getattr(module, "merged", False)]
        adapters = sorted({adapter for module in on.values() for adapter in module.active_adapters})
        return cls(
            model=inner,
            base=base,
            active=active,
            adapters=tuple(adapters),
            settings=tuple((name, name in merged, _scaling(module)) for name, module in on.items()),
            merged=bool(merged),
            unmerges=any(name not in on for name in merged),
        )

    @property
    def autocast(self) -> bool:
        """Whether a forward would compute in another dtype than the weights', on whatever device."""
        return any(map(torch.is_autocast_enabled, _AUTOCAST_DEVICES))

    def stored_base(self) -> Iterable[tuple[str, Tensor]]:
        """Base weights as a checkpoint holds them, persistent buffers among them, by name."""
        wrappers = _wrappers(self.model)
        state = self.model.state_dict().items()
        return sorted((_plain(name), tensor) for name, tensor in state if _owner(name, wrappers) is None)


def _wrappers(model: Any) -> dict[str, Any]:
    """The layers that PEFT put around others, by name. A model's own method of that name is none."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(type(module), "disable_adapters", None), property)
    }


def _owner(name: str, wrappers: Mapping[str, Any]) -> str | None:
    """The PEFT layer that added the parameter `name`; `None` for one of the base model."""
    parts = name.split(".") if wrappers else []
    for end in range(len(parts) - 1, 0, -1):
        if (prefix := ".".join(parts[:end])) in wrappers:
            return None if parts[end] in _WRAPPED else prefix
    return None


def _used_as(name: str, owner: str, wrapper: Any) -> str | None:
    """`name` with the adapter's position in place of its name; `None` if it takes no part in a forward."""
    if wrapper.disable_adapters or getattr(wrapper, "merged", False):
        return None
    own = name[len(owner) + 1 :].split(".")
    for position, adapter in enumerate(wrapper.active_adapters):
        if adapter in own:
            return ".".join([owner, *(str(position) if part == adapter else part for part in own)])
    return None


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def _scaling(wrapper: Any) -> tuple[float, ...]:
    scaling = getattr(wrapper, "scaling", {})
    return tuple(float(scaling[adapter]) for adapter in wrapper.active_adapters if adapter in scaling)


def _configuration(config: Any) -> dict[str, Any]:
    settings = {key: value for key, value in config.to_dict().items() if key not in _INCIDENTAL}
    return {key: sorted(map(str, v)) if isinstance(v, set) else str(v) for key, v in sorted(settings.items())}


def _fingerprint(tensors: Mapping[str, Tensor]) -> bytes:
    """Differs when the tensors were changed; costs a look at a few values of each."""
    state = hashlib.sha256()
    samples: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for name, tensor in tensors.items():
        # Tensors made in inference mode are not counted; neither can they be changed outside of it.
        version = -1 if tensor.is_inference() else tensor._version
        state.update(f"{name} {version} {tensor.data_ptr()}\n".encode())
        if not tensor.is_meta and tensor.numel():
            flat = tensor.detach().reshape(-1)
            samples[tensor.device, tensor.dtype].append(flat[flat.numel() // 2 :][:_SAMPLE])
    for runs in samples.values():
        state.update(as_bytes(torch.cat(runs).cpu()).numpy().data)
    return state.digest()


def _digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Raises `UnknownIdentity` for weights that are not in memory."""
    state = hashlib.sha256()
    for name, tensor in weights:
        if tensor.is_meta:
            raise UnknownIdentity(f"{name} is not in memory: its weights can only be known by their folder")
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        state.update(as_bytes(tensor.detach().cpu().contiguous()).numpy().data)
    return state.hexdigest()
