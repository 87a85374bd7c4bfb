"""Plans that map E, K and V, held against the transformers door."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from droidspeak.errors import MapsUnusable
from droidspeak.integrations.vllm_connector.rotary import EngineRotary
from droidspeak.layerselect.mapping import MapFeatures

from .engines import Request
from .models import (
    answer,
    assert_said,
    door,
    load,
    prompt,
    renamed,
    store_prefill,
    write_maps,
    write_plan,
)
from .stores import Disk

SIZE, LENGTH, WHOLE = 64, 230, 192
PLANS = ["2-3+emap", "reuse+kvmap", "1-2+emap+kvmap:0", "0-1+kvmap:3", "0-0,2-2+emap"]
# vLLM's own imports warn.
pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = [MapFeatures.LINEAR, MapFeatures.EMBEDDING]


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_mapped_equals_the_transformers_door(start, folders, manifests, tmp_path, mode, kind):
    sender, receiver = manifests
    policies = tmp_path / "policies"
    for number, plan in enumerate(PLANS):
        named = renamed(sender, plan)
        maps = write_maps(policies / f"{number}.safetensors", kind, named, receiver)
        write_plan(policies, named, receiver, plan, maps=maps)
    with Disk(tmp_path / "store") as disk:
        options = {"policies": str(policies), "vllm": {"load": mode}}
        with start(folders[1], tiers=[disk.url], chunk_size=SIZE, **options) as engine:
            for number, plan in enumerate(PLANS):
                ids = prompt(number, LENGTH)
                store_prefill(disk.tier, folders[0], renamed(sender, plan), ids, SIZE)
                own = 64 * (number % 3)  # tokens whose K and V are the receiver's own are not mapped
                if own:
                    store_prefill(disk.tier, folders[1], receiver, ids[:own], SIZE)
                (answered,) = engine.ask(Request(ids))
                assert answered.status == ("applied", "cross_model_hit")
                assert (answered.told["plan"], answered.told["exact_tokens"]) == (plan, own)
                with door(folders[1], disk.tier, SIZE, policies) as transformers:
                    right = answer(load(folders[1]), ids, transformers.prefill(ids))
                assert_said(answered, right)
                plain = answer(load(folders[1]), ids)
                assert (right.logprobs[0] - plain.logprobs[0]).abs().max() > 0.01


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_maps_that_cannot_be_used_are_passed_over_from_then_on(start, folders, manifests, tmp_path, mode):
    sender, receiver = manifests
    policies, ids = tmp_path / "policies", prompt(0, LENGTH)
    file = policies / "maps.safetensors"
    maps = write_maps(file, MapFeatures.LINEAR, sender, receiver)
    write_plan(policies, sender, receiver, "2-3+emap", 0.99, maps=maps, also={"0-2": 0.96})
    file.write_bytes(b"something else")
    right = answer(load(folders[1]), ids)
    with Disk(tmp_path / "store") as disk:
        store_prefill(disk.tier, folders[0], sender, ids, SIZE)
        options = {"policies": str(policies), "vllm": {"load": mode}, "quality_floor": 0.95}
        # With costs unknown the plan with the fewest recomputed layers is taken: the one that maps.
        with start(folders[1], tiers=[disk.url], chunk_size=SIZE, **options) as engine:
            (broken,) = engine.ask(Request(ids))
            assert broken.status == ("unsupported", "maps_unusable")
            assert_said(broken, right)
            assert engine.forget()
            (plain,) = engine.ask(Request(ids))
            assert (plain.status, plain.told["plan"]) == (("applied", "cross_model_hit"), "0-2")


def layers_with(**options) -> list[SimpleNamespace]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    given = {"head_size": 32, "max_position": 128, "is_neox_style": True, "dtype": torch.float32} | options
    with set_current_vllm_config(VllmConfig()):
        module = get_rope(**given)
    return [SimpleNamespace(self_attn=SimpleNamespace(rotary_emb=module))] * 2


ROPES = [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
    {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ROPES, ids=lambda options: options["rope_parameters"]["rope_type"])
def test_keys_are_rotated_as_vllm_does_and_back(options, dtype):
    rotary = EngineRotary(layers_with(**options, dtype=dtype))
    k = torch.randn(20, 2, 32)
    torch.testing.assert_close(rotary.unrotate(rotary.rotate(k, 1, 7), 1, 7), k, rtol=0, atol=1e-4)


def test_other_rotations_are_refused():
    with pytest.raises(MapsUnusable, match="rotated in a way"):
        EngineRotary(layers_with(**ROPES[0], is_neox_style=False))
    with pytest.raises(MapsUnusable, match="without a rotary"):
        EngineRotary([SimpleNamespace(self_attn=SimpleNamespace())])
