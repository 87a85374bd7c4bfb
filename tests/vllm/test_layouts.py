"""Caches that are no table of full attention: served where vLLM keeps all blocks, left alone elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MistralConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs

from droidspeak.integrations.vllm_connector.support import unsupported
from droidspeak.layerselect import Requirement
from droidspeak.storage import SourceManifest

from .engines import Request
from .models import VOCABULARY, answer, assert_said, door, load, prompt, write_plan
from .stores import Disk

LAYERS, CHUNK, WINDOW, LENGTH = 6, 64, 96, 400
SHARED = 384
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "sliding_window": WINDOW,
}


def save_model(folder, config, noise: float = 0.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        torch.manual_seed(1)
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.data *= 3
                weights.data += noise * weights.std() * torch.randn_like(weights)
        model.float().save_pretrained(folder)
    return folder


def gemma() -> Gemma3TextConfig:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    return Gemma3TextConfig(**SHAPE, layer_types=kinds, query_pre_attn_scalar=32)


def test_layers_with_a_window_beside_full_attention(nursery, tmp_path):
    folders = [save_model(tmp_path / name, gemma(), noise) for name, noise in (("one", 0.0), ("other", 0.3))]
    sides = [SourceManifest.from_folder(folder) for folder in folders]
    policies = write_plan(tmp_path / "policies", *sides, "1-4")
    ids, own = prompt(1, LENGTH), prompt(2, LENGTH)
    with Disk(tmp_path / "store") as disk:
        with door(folders[0], disk.tier, CHUNK, policies, save=True) as sender:
            sender.prefill(ids)
        with door(folders[1], disk.tier, CHUNK, policies) as receiver:
            mixed = answer(load(folders[1]), ids, receiver.prefill(ids, requirement=Requirement(1.0)))
        settings = {"tiers": [disk.url], "chunk_size": CHUNK, "policies": policies}
        with nursery.start(folders[1], **settings) as engine:
            shared, refused, first = engine.tell(
                Request(ids), Request(ids, cache={"share": False, "save": False}), Request(own)
            )
        with nursery.start(folders[1], **settings) as engine:
            (again,) = engine.ask(Request(own))
    assert (shared.status[1], shared.told["shared_tokens"]) == ("cross_model_hit", SHARED)
    assert_said(shared, mixed)
    assert_said(refused, answer(load(folders[1]), ids))
    for said, reason in ((first, "miss"), (again, "exact_hit")):
        assert said.status[1] == reason
        assert_said(said, answer(load(folders[1]), own))


def test_windows_only_are_left_alone(nursery, tmp_path):
    folder = save_model(tmp_path / "model", MistralConfig(**SHAPE))
    with Disk(tmp_path / "store") as disk:
        with nursery.start(folder, tiers=[disk.url], chunk_size=CHUNK) as engine:
            first, second = engine.tell(Request(prompt(1, LENGTH)), Request(prompt(1, LENGTH)))
            assert engine.said("a cache of SlidingWindowSpec: allowed is full attention")
        assert disk.keys() == set()
    assert first.status == second.status == ("unsupported", "unknown_weights")
    assert_said(first, answer(load(folder), prompt(1, LENGTH)))


FULL = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
SLIDING = SlidingWindowSpec(
    block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=WINDOW
)


@pytest.mark.parametrize(
    ("specs", "parallel", "message"),
    [
        ([FULL], {}, None),
        ([UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs={"one": FULL, "two": FULL})], {}, None),
        ([FULL, SLIDING], {}, "a cache of 2 groups of layers: allowed is one"),
        ([SLIDING], {}, "a cache of SlidingWindowSpec: allowed is full attention"),
        ([FULL], {"pipeline_parallel_size": 2}, "pipeline_parallel_size 2: allowed is 1"),
        ([FULL], {"decode_context_parallel_size": 2}, "decode_context_parallel_size 2: allowed is 1"),
    ],
)
def test_what_is_served(specs, parallel, message):
    config = SimpleNamespace(parallel_config=SimpleNamespace(**parallel))
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    assert unsupported(config, SimpleNamespace(kv_cache_groups=groups)) == message
