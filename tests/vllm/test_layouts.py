"""Which caches are served, and what is known of their tables."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own imports warn

BLOCK, WINDOW = 32, 96


def specs():
    from vllm.v1 import kv_cache_interface

    shape = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    full = kv_cache_interface.FullAttentionSpec(**shape)
    kinds = {
        "full": full,
        # What vLLM makes of a layer with a window where it is told to keep all blocks.
        "kept": kv_cache_interface.FullAttentionSpec(**shape, sliding_window=WINDOW),
        "window": kv_cache_interface.SlidingWindowSpec(**shape, sliding_window=WINDOW),
        "local": kv_cache_interface.ChunkedLocalAttentionSpec(**shape, attention_chunk_size=64),
    }
    uniform = kv_cache_interface.UniformTypeKVCacheSpecs
    kinds["uniform"] = uniform(block_size=BLOCK, kv_cache_specs={"one": full, "two": full})
    kinds["windows"] = uniform(block_size=BLOCK, kv_cache_specs={"one": kinds["window"]})
    return kinds


def cache(*names: str) -> SimpleNamespace:
    kinds = specs()
    groups = [
        SimpleNamespace(
            kv_cache_spec=kinds[name], layer_names=["one", "two"] if name == "uniform" else [name]
        )
        for name in names
    ]
    return SimpleNamespace(kv_cache_groups=groups)


@pytest.mark.parametrize(
    ("names", "parallel", "message"),
    [
        (["full"], {}, None),
        (["kept"], {}, None),
        (["uniform"], {}, None),
        (["full", "window"], {}, None),
        (["window"], {}, None),
        ([], {}, "no cache of attention"),
        (
            ["full", "local"],
            {},
            "a cache of ChunkedLocalAttentionSpec: allowed are full attention and sliding windows",
        ),
        (["full"], {"pipeline_parallel_size": 2}, "pipeline_parallel_size 2: allowed is 1"),
        (["full"], {"decode_context_parallel_size": 2}, "decode_context_parallel_size 2: allowed is 1"),
    ],
)
def test_what_is_served(names, parallel, message):
    from droidspeak.integrations.vllm_connector.support import unsupported

    config = SimpleNamespace(parallel_config=SimpleNamespace(**parallel))
    assert unsupported(config, cache(*names)) == message


@pytest.mark.parametrize(
    ("names", "whole"),
    [
        (["full"], True),
        (["kept"], True),
        (["uniform"], True),
        (["window"], False),
        (["full", "window"], False),
        (["full", "kept"], False),
    ],
)
def test_where_single_blocks_can_be_computed_anew(names, whole):
    from droidspeak.integrations.vllm_connector.tables import keeps_all

    assert keeps_all(cache(*names)) is whole


def test_tables_of_layers():
    from droidspeak.integrations.vllm_connector.tables import BlockTable, tables_by_layer

    assert tables_by_layer(cache("uniform", "window")) == {
        "one": BlockTable(0, BLOCK),
        "two": BlockTable(0, BLOCK),
        "window": BlockTable(1, BLOCK, WINDOW),
    }
    assert tables_by_layer(cache("kept")) == {"kept": BlockTable(0, BLOCK)}


@pytest.mark.parametrize(
    ("ids", "first"), [((), 0), ((3, 4), 0), ((0, 0, 7), 64), ((5, 0, 7), 64), ((0,), 32)]
)
def test_from_where_on_blocks_are_there(ids, first):
    from droidspeak.integrations.vllm_connector.tables import live_from

    assert live_from(ids, BLOCK) == first
