"""What an engine saves: K, V and E of its own prefill, as transformers computes them."""

from __future__ import annotations

import pytest
import torch

from droidspeak.integrations.transformers import capture

from .engines import Request
from .models import assert_near, keys_of, load, prompt, stored, write_plan

SIZE, E_LAYERS = 64, [1, 3]


@pytest.fixture(scope="module")
def policies(tmp_path_factory, manifests) -> str:
    """They ask for E of `E_LAYERS`."""
    return write_plan(tmp_path_factory.mktemp("policies"), *manifests, "1,3")


@pytest.fixture(scope="module")
def engine(start, folders, disk, policies):
    """A sender that prefills in pieces of 128 tokens."""
    return start(
        folders[0],
        role="kv_producer",
        e_layers=E_LAYERS,
        tiers=[disk.url],
        chunk_size=SIZE,
        policies=policies,
    )


def right(folder, token_ids, e_layers=E_LAYERS):
    return capture(load(folder), torch.tensor(token_ids), e_layers)


@pytest.mark.parametrize("length", [64, 65, 127, 128, 300])
def test_whole_chunks_with_e(engine, folders, manifests, disk, length):
    ids = prompt(length, length)
    (answer,) = engine.ask(Request(ids))
    assert answer.status == ("fallback_reprefill", "miss")
    keys = keys_of(manifests[0], ids, SIZE)
    assert len(keys) == length // SIZE
    disk.wait(keys)
    assert_near(stored(disk.tier, keys_of(manifests[0], ids, SIZE), E_LAYERS), right(folders[0], ids))


def test_nothing_but_whole_chunks_of_the_prompt(engine, manifests, disk):
    before = disk.keys()
    engine.tell(Request(prompt(1, 63)), Request(prompt(2, 60), new=80), Request(prompt(3, 64)))
    disk.wait(keys_of(manifests[0], prompt(3, 64), SIZE))
    assert disk.keys() - before == set(keys_of(manifests[0], prompt(3, 64), SIZE))


def test_what_the_engine_had_in_its_own_prefix_cache(engine, folders, manifests, disk):
    ids = prompt(4, 300)
    (first,) = engine.ask(Request(ids[:170], cache={"save": False}))
    assert not disk.keys() & set(keys_of(manifests[0], ids, SIZE))
    (answer,) = engine.ask(Request(ids))
    assert (first.cached, answer.cached) == (0, 160)
    disk.wait(keys_of(manifests[0], ids, SIZE))
    assert_near(stored(disk.tier, keys_of(manifests[0], ids, SIZE), E_LAYERS), right(folders[0], ids))


def test_requests_that_are_prefilled_together(engine, folders, manifests, disk):
    prompts = [prompt(number, 100 + 30 * number) for number in range(5, 9)]
    engine.ask(*(Request(ids, at=at) for at, ids in enumerate(prompts)))
    for ids in prompts:
        disk.wait(keys_of(manifests[0], ids, SIZE))
        assert_near(stored(disk.tier, keys_of(manifests[0], ids, SIZE), E_LAYERS), right(folders[0], ids))


@pytest.mark.parametrize("captured", [(), (3,)])
def test_a_sender_that_captures_less(start, folders, manifests, disk, policies, captured):
    ids = prompt(20 + len(captured), 200)
    with start(
        folders[0],
        role="kv_producer",
        e_layers=captured,
        tiers=[disk.url],
        chunk_size=SIZE,
        policies=policies,
    ) as engine:
        engine.ask(Request(ids))
    keys = keys_of(manifests[0], ids, SIZE)
    assert [disk.tier.head(key).e_layers for key in keys] == [captured] * 3
    assert_near(
        stored(disk.tier, keys_of(manifests[0], ids, SIZE), captured), right(folders[0], ids, captured)
    )
    with start(folders[1], tiers=[disk.url], chunk_size=SIZE, policies=policies) as engine:
        (answer,) = engine.ask(Request(ids))
    assert (answer.status, answer.cached) == (("fallback_reprefill", "e_missing"), 0)


def test_e_of_chunks_that_were_loaded_is_never_made_up(start, folders, manifests, disk, policies):
    """E is not loaded with a model's own chunks: what is in its place must not be saved."""
    early, lost, late = prompt(30, 200), prompt(31, 200), prompt(32, 64)
    sender, options = manifests[0], {"tiers": [disk.url], "chunk_size": SIZE, "policies": policies}
    with start(folders[0], **options) as engine:  # before any policy asked for E
        engine.ask(Request(early))
    with start(folders[0], e_layers=E_LAYERS, **options) as engine:
        engine.ask(Request(lost))
        disk.wait(keys_of(sender, lost, SIZE))
        assert engine.forget()
        loaded, again = engine.tell(Request(lost), Request(early))
        # The engine's own prefix cache has K and V of what the store has lost now.
        for key in keys_of(sender, lost, SIZE):
            disk.tier.delete(key)
        engine.tell(Request(lost), Request(late))
        disk.wait(keys_of(sender, late, SIZE))
    assert loaded.status == ("applied", "exact_hit")
    assert again.status == ("fallback_reprefill", "e_missing")
    assert_near(stored(disk.tier, keys_of(sender, early, SIZE), E_LAYERS), right(folders[0], early))
    assert not disk.keys() & set(keys_of(sender, lost, SIZE))
