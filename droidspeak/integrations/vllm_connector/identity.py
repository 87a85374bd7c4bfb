"""Whose cache is this? The identity of the model that a vLLM engine serves, adapters included."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from droidspeak.errors import IdentityError, UnknownIdentity
from droidspeak.storage import Architecture, SourceManifest
from droidspeak.storage.identity import tokenizer_digest, weights_digest

__all__ = ["Identities"]

_log = logging.getLogger(__name__)
_REMEMBERED_ADAPTERS = 64


class Identities:
    """Manifests of one engine's model: bare, and with each LoRA adapter that requests name.

    Args:
        vllm_config: of the engine.
        unsupported: why the engine is not served at all, if it is not.

    An adapter counts by its file: one that is replaced at its path while it is loaded in vLLM must get
    another name there, as vLLM itself asks for.
    """

    def __init__(self, vllm_config: Any, unsupported: str | None = None) -> None:
        self._config, self._unsupported = vllm_config, unsupported
        self._adapters: dict[tuple[str, str], SourceManifest | None] = {}
        self._base = self._identify(None)

    def manifest(self, lora_request: Any | None = None) -> SourceManifest | None:
        """The manifest of the model a request runs on; `None` if it cannot be identified."""
        if lora_request is None or self._base is None:
            return self._base
        name = (str(lora_request.lora_name), str(lora_request.lora_path))
        if name not in self._adapters:
            if len(self._adapters) >= _REMEMBERED_ADAPTERS:
                self._adapters.pop(next(iter(self._adapters)))
            self._adapters[name] = self._identify(Path(lora_request.lora_path))
        return self._adapters[name]

    def _identify(self, adapter: Path | None) -> SourceManifest | None:
        try:
            if self._unsupported is not None:
                raise UnknownIdentity(self._unsupported)
            return _manifest(self._config, adapter)
        except IdentityError as error:
            _log.warning("no sharing and no saving: %s", error)
            return None


def _manifest(config: Any, adapter: Path | None) -> SourceManifest:
    model = config.model_config
    if model.quantization is not None:
        raise UnknownIdentity(f"quantisation {model.quantization}: allowed are models as they are stored")
    if config.load_config.load_format not in ("auto", "safetensors"):
        raise UnknownIdentity(f"load format {config.load_config.load_format!r}; allowed: auto, safetensors")
    if config.cache_config.cache_dtype != "auto":
        raise UnknownIdentity(f"cache dtype {config.cache_config.cache_dtype!r}; allowed: auto")
    if getattr(model.hf_text_config, "num_kv_shared_layers", 0):
        raise UnknownIdentity("layers that share their KV: allowed are layers with KV of their own")
    folder = _folder(model.model, model.revision)
    architecture = Architecture.from_config(model.hf_config.to_dict(), str(model.dtype))
    return SourceManifest(
        weights=weights_digest(folder),
        architecture=architecture,
        tokenizer=tokenizer_digest(
            _folder(model.tokenizer, model.tokenizer_revision), architecture.vocab_size
        ),
        adapter=None if adapter is None else weights_digest(adapter, stem="adapter_model"),
    )


def _folder(name: str, revision: str | None) -> Path:
    """Where the files of a model are that vLLM has loaded by path or by its name on the hub."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UnknownIdentity(f"the files of {name!r} are not here: {error}") from None
