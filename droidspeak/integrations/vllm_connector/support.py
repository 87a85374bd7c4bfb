"""Which engines are served: those whose cache is one table of blocks of full attention, on one rank or split
by tensor parallelism only. In others a request's rows are not where the connector would look for them.
"""

from __future__ import annotations

from typing import Any

__all__ = ["unsupported"]

_PARALLEL = ("pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size")


def unsupported(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """Why the connector leaves this engine alone, in one line; `None` if it serves it.

    A sliding window is no obstacle where vLLM keeps all blocks, as it does for models that also have layers
    of full attention. Where all layers have a window, blocks behind it are given to others.
    """
    for option in _PARALLEL:
        if (size := getattr(vllm_config.parallel_config, option, 1)) != 1:
            return f"{option} {size}: allowed is 1"
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"a cache of {len(groups)} groups of layers: allowed is one"
    strange = sorted(set(map(_kind, _specs(groups[0].kv_cache_spec))) - {"full_attention", _E})
    return f"a cache of {', '.join(strange)}: allowed is full attention" if strange else None


_E = "hidden states"


def _specs(spec: Any) -> list[Any]:
    return list(getattr(spec, "kv_cache_specs", {"": spec}).values())


def _kind(spec: Any) -> str:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, HiddenStateCacheSpec

    if isinstance(spec, HiddenStateCacheSpec):
        return _E
    return "full_attention" if type(spec) is FullAttentionSpec else type(spec).__name__
