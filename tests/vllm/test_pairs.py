"""Two engines, one after the other: what the first has prefilled, with E, the second one uses."""

from __future__ import annotations

import pytest

from droidspeak.storage import SourceManifest

from .engines import Request
from .models import NEAR, answer, assert_said, door, keys_of, load, prompt, save_model, write_plan
from .stores import Disk

LENGTH, PLAN = 300, "1-2"
SHAPES = {  # architecture, tokens per block, tokens per chunk, whether the receiver captures E as well
    "llama": ("llama", 128, 64, True),
    "mistral": ("mistral", 64, 32, False),
    "qwen2": ("qwen2", 32, 128, True),
    "qwen3": ("qwen3", 32, 64, False),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_receiver_uses_what_the_sender_has_prefilled(start, tmp_path, shape):
    architecture, block, size, both = SHAPES[shape]
    folders = [save_model(tmp_path / str(noise), architecture, noise=noise) for noise in (0.0, 0.3)]
    sender, receiver = map(SourceManifest.from_folder, folders)
    policies = write_plan(tmp_path / "policies", sender, receiver, PLAN)
    ids, whole = prompt(1, LENGTH), LENGTH // size * size
    with Disk(tmp_path / "store") as disk:
        options = {"tiers": [disk.url], "chunk_size": size, "policies": policies}
        options["engine"] = {"block_size": block}
        with start(folders[0], role="kv_producer", e_layers=[1], **options) as engine:
            (sent,) = engine.ask(Request(ids, new=1))
        assert disk.keys() == set(keys_of(sender, ids, size))
        with start(folders[1], e_layers=[1] if both else [], **options) as engine:
            (mixed,) = engine.ask(Request(ids))
            (own,) = engine.ask(Request(ids, cache={"share": False, "save": False}))
        with door(folders[1], disk.tier, size, policies) as transformers:
            right = answer(load(folders[1]), ids, transformers.prefill(ids, sender=sender))
        assert disk.keys() == set(keys_of(sender, ids, size))
    assert sent.status[0] == "fallback_reprefill"
    assert (mixed.status, mixed.cached) == (("applied", "cross_model_hit"), whole)
    assert (mixed.told["plan"], mixed.told["source"]) == (PLAN, sender.source_id)
    assert_said(own, answer(load(folders[1]), ids))
    assert own.cached == 0
    assert_said(mixed, right)
    assert max(abs(float(right.logprobs[0][t]) - p) for t, p in own.logprobs[0].items()) > 10 * NEAR
