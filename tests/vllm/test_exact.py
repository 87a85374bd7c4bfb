"""One model, two doors: what vLLM has saved serves transformers, and the other way round."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from droidspeak.integrations.transformers import capture
from droidspeak.storage import SourceManifest

from .engines import Request
from .models import NEAR, answer, assert_near, assert_said, door, keys_of, load, prompt, save_model, stored
from .stores import Disk

LENGTH = 300
SHAPES = {  # architecture, tokens per block, tokens per chunk
    "llama-32-64": ("llama", 32, 64),
    "llama-64-32": ("llama", 64, 32),
    "llama-128-256": ("llama", 128, 256),
    "mistral-64-64": ("mistral", 64, 64),
    "qwen2-32-128": ("qwen2", 32, 128),
    "qwen3-128-16": ("qwen3", 128, 16),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_both_doors_are_one_source(start, tmp_path, shape):
    architecture, block, size = SHAPES[shape]
    folder = save_model(tmp_path / "model", architecture)
    source, whole = SourceManifest.from_folder(folder), LENGTH // size * size
    mine, theirs = prompt(1, LENGTH), prompt(2, LENGTH)
    with Disk(tmp_path / "store") as disk:
        options = {"tiers": [disk.url], "chunk_size": size, "engine": {"block_size": block}}
        with closing(door(folder, disk.tier, size, save=True)) as transformers:
            transformers.prefill(theirs)
            transformers.flush()
            with start(folder, **options) as engine:
                first, loaded = engine.tell(Request(mine), Request(theirs))
            # vLLM has stored it under the name that the folder has in transformers.
            assert transformers.manifest == source
            assert disk.keys() == {*keys_of(source, mine, size), *keys_of(source, theirs, size)}
            right = capture(load(folder), torch.tensor(mine))
            assert_near(stored(disk.tier, keys_of(source, mine, size)), right)
            prefix = transformers.prefill(mine)
            assert prefix.outcome.exact_tokens == whole
        with start(folder, **options) as engine:
            (again,) = engine.ask(Request(mine))
    assert (first.status, first.cached) == (("fallback_reprefill", "miss"), 0)
    for answered in (loaded, again):
        assert (answered.status, answered.cached) == (("applied", "exact_hit"), whole)
        assert answered.told["exact_tokens"] == whole
    own = answer(load(folder), mine)
    assert_said(first, own)
    assert_said(again, own)
    assert_said(loaded, answer(load(folder), theirs))
    torch.testing.assert_close(answer(load(folder), mine, prefix).logprobs, own.logprobs, rtol=0, atol=NEAR)


def test_the_last_token_is_left_to_the_engine(start, folders, manifests, disk):
    """Prompts that end with a chunk, with a block, and with both."""
    options = {"tiers": [disk.url], "chunk_size": 64, "engine": {"block_size": 64}}
    prompts = [prompt(10 + length, length) for length in (64, 65, 127, 128, 129)]
    with start(folders[0], **options) as engine:
        first = engine.tell(*map(Request, prompts))
        for ids in prompts:
            disk.wait(keys_of(manifests[0], ids, 64))
        assert engine.forget()
        again = engine.tell(*map(Request, prompts))
    assert [answered.cached for answered in again] == [0, 64, 64, 64, 128]
    assert again[0].status == ("fallback_reprefill", "too_short")
    for ids, one, other in zip(prompts, first, again, strict=True):
        right = answer(load(folders[0]), ids)
        assert_said(one, right)
        assert_said(other, right)


def test_tenants_do_not_meet(start, folders, manifests, disk):
    ids = prompt(30, 200)
    options = {"tiers": [disk.url], "chunk_size": 64, "salt": "ours"}
    with start(folders[0], **options) as engine:
        engine.tell(Request(ids), Request(ids, salt="theirs"))
        disk.wait(keys_of(manifests[0], ids, 64, "ours"))
        disk.wait(keys_of(manifests[0], ids, 64, "ours\0theirs"))
        assert engine.forget()
        hit, other, miss = engine.tell(*(Request(ids, salt=salt) for salt in (None, "theirs", "nobody's")))
    assert [answered.cached for answered in (hit, other, miss)] == [192, 192, 0]
    assert miss.status == ("fallback_reprefill", "miss")
    assert not disk.keys() & set(keys_of(manifests[0], ids, 64))


def test_loaded_and_computed_run_on_as_one(start, folders, manifests, disk):
    """A longer prompt: its first chunks come from the store, the others are saved."""
    ids = prompt(40, 400)
    options = {"tiers": [disk.url], "chunk_size": 64}
    with start(folders[0], **options) as engine:
        engine.ask(Request(ids[:200]))
        disk.wait(keys_of(manifests[0], ids[:200], 64))
        assert engine.forget()
        (longer,) = engine.ask(Request(ids))
        disk.wait(keys_of(manifests[0], ids, 64))
        assert engine.forget()
        (again,) = engine.ask(Request(ids))
    assert (longer.cached, again.cached) == (192, 384)
    right = answer(load(folders[0]), ids)
    assert_said(longer, right)
    assert_said(again, right)
    assert_near(
        stored(disk.tier, keys_of(manifests[0], ids, 64)), capture(load(folders[0]), torch.tensor(ids))
    )
