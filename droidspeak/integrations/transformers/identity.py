"""Whose cache will this be? The identity of a model that is loaded in this process.

Weights are identified by the folder they came from, if the caller vouches for it, else by their bytes
in memory. Adapters are always identified by their bytes: which one is active can change between two
requests. Changed weights are noticed (torch counts in-place changes of each tensor), and a model that
no longer is what its folder says has no identity: it neither shares nor saves.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from droidspeak.errors import UnknownIdentity
from droidspeak.storage import Architecture, SourceManifest
from droidspeak.storage.codecs import as_bytes
from droidspeak.storage.identity import tokenizer_digest, weights_digest

__all__ = ["ModelIdentity", "manifest_of"]

_log = logging.getLogger(__name__)


def manifest_of(model: Any, folder: Path | str | None = None) -> SourceManifest:
    """The manifest of a loaded model.

    Args:
        model: PreTrainedModel, or PeftModel: base and active adapters make one source.
        folder: where base weights and tokenizer were loaded from, unchanged. Without it the weights
            are hashed in memory and prompts are taken to be token ids.

    Raises:
        UnknownIdentity: the folder or the configuration does not identify the model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    architecture = Architecture.from_config(base.config.to_dict(), str(base.dtype))
    plain, adapters = _split(base)
    # Merged weights are neither the folder's nor the adapter's: only their bytes tell what they are.
    from_folder = folder is not None and not _merged(base)
    return SourceManifest(
        weights=weights_digest(Path(folder or "")) if from_folder else f"memory:{_digest(plain)}",
        architecture=architecture,
        tokenizer=_tokenizer(folder, architecture.vocab_size),
        adapter=_adapter_digest(model, adapters),
    )


def _tokenizer(folder: Path | str | None, vocab_size: int) -> str:
    return f"ids:{vocab_size}" if folder is None else tokenizer_digest(Path(folder), vocab_size)


class ModelIdentity:
    """Follows a model through changes of its weights and adapters.

    Args:
        folder: see `manifest_of`.
    """

    def __init__(self, model: Any, folder: Path | str | None = None) -> None:
        self._model, self._folder = model, folder
        self._weights = self._versions()
        self._known: dict[object, SourceManifest | None] = {}
        self.manifest()

    def manifest(self) -> SourceManifest | None:
        """The manifest of the model as it is now; `None` if it cannot be identified."""
        changed = self._versions() != self._weights
        state = (self._versions() if changed else None, _adapter_state(self._model))
        if state not in self._known:
            self._known[state] = self._identify(changed)
        return self._known[state]

    def _identify(self, changed: bool) -> SourceManifest | None:
        try:
            if changed and self._folder is not None:
                raise UnknownIdentity(f"weights are no longer those of {self._folder}")
            return manifest_of(self._model, self._folder)
        except UnknownIdentity as error:
            _log.warning("no sharing and no saving: %s", error)
            return None

    def _versions(self) -> int:
        return hash(tuple((p.data_ptr(), p._version) for p in self._model.parameters()))


def _split(base: Any) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Named weights of the base model, and of the adapters inside it."""
    plain: list[tuple[str, Tensor]] = []
    adapters: list[tuple[str, Tensor]] = []
    for name, tensor in sorted(base.state_dict().items()):
        (adapters if "lora_" in name else plain).append((name.replace(".base_layer", ""), tensor))
    return plain, adapters


def _merged(base: Any) -> bool:
    return any(getattr(module, "merged", False) for module in base.modules())


def _adapter_digest(model: Any, weights: list[tuple[str, Tensor]]) -> str | None:
    active, merged, disabled = _adapter_state(model)
    if not active or merged or disabled:
        return None
    used = [(name, tensor) for name, tensor in weights if any(f".{adapter}." in name for adapter in active)]
    configs = [model.peft_config[adapter].to_dict() for adapter in active]
    settings = json.dumps(configs, sort_keys=True, default=lambda value: sorted(map(str, value)))
    return hashlib.sha256((settings + _digest(used)).encode()).hexdigest()


def _adapter_state(model: Any) -> tuple[tuple[str, ...], bool, bool]:
    """Active adapters, whether they are merged, whether they are switched off."""
    if not hasattr(model, "peft_config"):
        return (), False, False
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    off = any(layer.disable_adapters for layer in layers)
    return tuple(model.active_adapters), _merged(model), off


def _digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    state = hashlib.sha256()
    for name, tensor in weights:
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        state.update(as_bytes(tensor.detach().cpu().contiguous()).numpy().data)
    return state.hexdigest()
