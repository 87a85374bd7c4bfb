"""vLLM's tables of blocks: one for each of its KV cache groups, that is for each kind of layers.

In every table a request has a list of block ids, from its first token on. Of layers with a sliding window
vLLM keeps the last blocks only, and puts its null block into the places of the others.
Source: vllm/v1/core/kv_cache_utils.py and single_type_kv_cache_manager.py of 0.32.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["NULL_BLOCK", "BlockTable", "Tables", "keeps_all", "live_from", "tables_by_layer"]

NULL_BLOCK = 0
"""vLLM's block that is nobody's: it stands for blocks that are gone."""

Tables = tuple[tuple[int, ...], ...]
"""Block ids of a request, by table."""


@dataclass(frozen=True)
class BlockTable:
    """One of an engine's tables.

    Attributes:
        index: which of a request's tables it is.
        block_size: tokens of a block.
        window: of the layers' attention, in tokens, where blocks behind it are let go; `None` where all stay.
    """

    index: int
    block_size: int
    window: int | None = None


def tables_by_layer(kv_cache_config: Any) -> dict[str, BlockTable]:
    """The table of each layer, by vLLM's names of layers."""
    return {
        name: BlockTable(index, group.kv_cache_spec.block_size, _window(_spec_of(group.kv_cache_spec, name)))
        for index, group in enumerate(kv_cache_config.kv_cache_groups)
        for name in group.layer_names
    }


def keeps_all(kv_cache_config: Any) -> bool:
    """Whether there is one table, and no block of it is let go while its request runs.

    In others vLLM cannot compute some blocks of a request anew: it needs them all, or none.
    """
    tables = tables_by_layer(kv_cache_config).values()
    return len({table.index for table in tables}) == 1 and all(table.window is None for table in tables)


def live_from(block_ids: Sequence[int], block_size: int) -> int:
    """The first token from which on all blocks are there."""
    gone = [place for place, block in enumerate(block_ids) if block == NULL_BLOCK]
    return (gone[-1] + 1) * block_size if gone else 0


def _spec_of(spec: Any, name: str) -> Any:
    return getattr(spec, "kv_cache_specs", {}).get(name, spec)


def _window(spec: Any) -> int | None:
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    # A full attention spec may name a window, too: where vLLM was told to keep all blocks.
    return int(spec.sliding_window) if isinstance(spec, SlidingWindowSpec) else None
