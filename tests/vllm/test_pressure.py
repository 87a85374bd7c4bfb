"""Few blocks: requests are pushed out while they run, and come back."""

from __future__ import annotations

import pytest

from .engines import Request
from .models import answer, assert_said, door, keys_of, load, prompt, store_prefill, write_plan
from .stores import Disk

SIZE, LENGTH, NEW = 64, 230, 100


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("held", ["sender's", "own", "nothing"])
def test_requests_that_are_preempted(start, folders, manifests, tmp_path, mode, held):
    policies = write_plan(tmp_path / "policies", *manifests, "1-2")
    prompts = [prompt(n, LENGTH) for n in range(3)]
    source = manifests[0] if held == "sender's" else manifests[1]
    with Disk(tmp_path / "store") as disk:
        for ids in prompts if held != "nothing" else ():
            store_prefill(disk.tier, folders[held == "own"], source, ids, SIZE)
        options = {"tiers": [disk.url], "chunk_size": SIZE, "policies": policies, "vllm": {"load": mode}}
        # All prompts fit into 24 blocks of 32 tokens, but not their answers.
        few = {"num_gpu_blocks_override": 26, "max_model_len": 512}
        with start(folders[1], engine=few, **options) as engine:
            answers = engine.ask(*(Request(ids, new=NEW) for ids in prompts))
            assert engine.count("num_preemptions") > 0
            assert engine.forget()
        keys = {key for ids in prompts for key in keys_of(source, ids, SIZE)}
        assert disk.keys() == keys
        with door(folders[1], disk.tier, SIZE, policies) as transformers:
            for ids, answered in zip(prompts, answers, strict=True):
                prefix = transformers.prefill(ids)
                assert prefix.tokens == 192
                assert len(answered.tokens) == NEW
                assert_said(answered, answer(load(folders[1]), ids, prefix, new=NEW))
    expected = {"sender's": "cross_model_hit", "own": "exact_hit", "nothing": "miss"}[held]
    assert [answered.status[1] for answered in answers] == [expected] * 3
