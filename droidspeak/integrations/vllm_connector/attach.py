"""The loaded model, for the connector: vLLM hands connectors its caches, never its layers.

`register` is the package's `vllm.general_plugins` entry point: vLLM calls it in every process before a
model is loaded. It wraps the model loader's one method and notes the target model; draft models pass by.
"""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakValueDictionary

__all__ = ["model_of", "register"]

_MODELS: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register() -> None:
    """Notes every target model that vLLM loads in this process from now on. Calling it twice is fine."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    load_model = BaseModelLoader.load_model
    if hasattr(load_model, "droidspeak"):
        return

    @functools.wraps(load_model)
    def noting(loader: Any, vllm_config: Any, model_config: Any, *rest: Any, **options: Any) -> Any:
        model = load_model(loader, vllm_config, model_config, *rest, **options)
        # A draft model may come with a configuration of its own, but always with a prefix.
        if model_config is vllm_config.model_config and not options.get("prefix"):
            _MODELS[_key(vllm_config)] = model
        return model

    noting.droidspeak = True  # type: ignore[attr-defined]
    BaseModelLoader.load_model = noting


def model_of(vllm_config: Any) -> Any | None:
    """The model loaded for `vllm_config` in this process, `None` if the plug-in was not there in time."""
    return _MODELS.get(_key(vllm_config))


def _key(vllm_config: Any) -> int:
    # The one object that loader and connector share: configurations are copied on their way.
    return id(vllm_config.compilation_config.static_forward_context)
