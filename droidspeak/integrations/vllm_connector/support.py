"""Which engines are served: those whose cache is blocks of full attention or of sliding windows, on one rank
or split by tensor parallelism only. In others a request's rows are not where the connector looks for them.
"""

from __future__ import annotations

from typing import Any

__all__ = ["unsupported"]

_PARALLEL = ("pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size")


def unsupported(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """Why the connector leaves this engine alone, in one line; `None` if it serves it."""
    for option in _PARALLEL:
        if (size := getattr(vllm_config.parallel_config, option, 1)) != 1:
            return f"{option} {size}: allowed is 1"
    specs = [spec for group in kv_cache_config.kv_cache_groups for spec in _specs(group.kv_cache_spec)]
    strange = sorted({type(spec).__name__ for spec in specs if not _served(spec)})
    if strange:
        return f"a cache of {', '.join(strange)}: allowed are full attention and sliding windows"
    return None if specs else "no cache of attention"


def _specs(spec: Any) -> list[Any]:
    return list(getattr(spec, "kv_cache_specs", {"": spec}).values())


def _served(spec: Any) -> bool:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, HiddenStateCacheSpec, SlidingWindowSpec

    # Not their subclasses: those hold something else.
    return type(spec) in (FullAttentionSpec, SlidingWindowSpec, HiddenStateCacheSpec)
