"""Every architecture through the door: the same bits as the plain model, wherever they came from."""

from __future__ import annotations

import pytest
import torch

from droidspeak.connector import Reason
from droidspeak.integrations.transformers import Decoder, capture, past_key_values
from droidspeak.layerselect import PolicySet
from droidspeak.storage import TieredStore
from droidspeak.storage.disk import DiskTier

from .sharing import (
    SIZE,
    door,
    fill,
    greedy,
    left_padded,
    logits_after,
    memory,
    own_logits,
    partial_plans,
    policy,
    pretended_folder,
    sources_in,
)
from .tiny_models import ARCHITECTURES, tiny_model, tokens

IDS = tokens(3 * SIZE + 5, seed=1)
CUT = 3 * SIZE

pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)


def pair(store, sender_model, receiver_model, tmp_path):
    """Doors of two models that go as different sources, whatever their weights are."""
    return [
        door(model, store, PolicySet(), folder=pretended_folder(tmp_path, name))
        for name, model in (("sender", sender_model), ("receiver", receiver_model))
    ]


def every_group_stored_anew(store, sender, receiver):
    for plan in partial_plans(receiver.decoder.num_layers):
        for key in list(store.keys()):
            store.delete(key)
        for droid in (sender, receiver):
            droid.connector.policies.add(policy(sender, receiver, plan))
        fill(sender, IDS)
        yield plan


def test_every_group_of_a_twin_equals_the_plain_model(architecture, tmp_path):
    model, store = tiny_model(architecture), memory()
    sender, receiver = pair(store, model, model, tmp_path)
    expected = own_logits(model, IDS, CUT)
    for plan in every_group_stored_anew(store, sender, receiver):
        prefix = receiver.prefill(IDS)
        assert (prefix.outcome.reason, prefix.outcome.shared_tokens) == (Reason.CROSS_MODEL_HIT, CUT)
        assert prefix.outcome.plan == plan
        assert torch.equal(logits_after(model, prefix, IDS), expected), str(plan)
    assert sources_in(store) == {sender.manifest.source_id}


def test_every_group_of_another_model_equals_its_reference(architecture, tmp_path):
    """And differs from the plain model: the cache really was another's."""
    theirs, mine, store = tiny_model(architecture, seed=7), tiny_model(architecture), memory()
    sender, receiver = pair(store, theirs, mine, tmp_path)
    plain = own_logits(mine, IDS, CUT)
    decoder = Decoder(mine)
    sent = capture(theirs, IDS[:CUT], range(decoder.num_layers))
    for plan in every_group_stored_anew(store, sender, receiver):
        layers = list(sent.layers)
        for group in plan.groups:
            e = sent.e(group.start) if group.start else None
            layers[group.start : group.end + 1] = decoder.recompute(IDS[:CUT], group.start, group.end, e=e)
        with torch.no_grad():
            cache = past_key_values(decoder.config, layers)
            expected = mine(IDS[None, CUT:], past_key_values=cache).logits[0]
        got = logits_after(mine, receiver.prefill(IDS), IDS)
        assert torch.equal(got, expected), str(plan)
        assert (got - plain).abs().max() > 1e-3, str(plan)


@pytest.mark.parametrize("kind", ["memory", "disk raw", "disk zstd", "tiered"])
def test_exact_reuse_equals_own_prefill(architecture, kind, tmp_path):
    model = tiny_model(architecture)
    disk = DiskTier(tmp_path / "store", min_free=0)
    store = {"memory": memory(), "tiered": TieredStore([memory(), disk])}.get(kind, disk)
    codec = "zstd" if kind == "disk zstd" else "raw"
    with store:
        with door(model, store, codec=codec) as writer:
            first = writer.prefill(IDS)
        store_again = TieredStore([memory(), disk]) if kind == "tiered" and store.flush() else store
        second = door(model, store_again, codec=codec).prefill(IDS)
        store_again.close()
    assert (first.outcome.reason, second.outcome.reason) == (Reason.MISS, Reason.EXACT_HIT)
    assert (first.tokens, second.tokens, second.outcome.exact_tokens) == (CUT, CUT, CUT)
    expected = own_logits(model, IDS, CUT)
    for prefix in (first, second):
        assert torch.equal(logits_after(model, prefix, IDS), expected)
    for (k, v), (own_k, own_v) in zip(second.layers, first.layers, strict=True):
        assert torch.equal(k, own_k)
        assert torch.equal(v, own_v)


def test_generate_equals_plain_generate(architecture):
    model = tiny_model(architecture)
    expected = greedy(model, IDS[None])
    droid = door(model, memory())
    for reason in (Reason.MISS, Reason.EXACT_HIT):
        answer = droid.generate(IDS[None], max_new_tokens=10, do_sample=False)
        assert torch.equal(answer.sequences, expected)
        assert [outcome.reason for outcome in answer.outcomes] == [reason]
        droid.flush()


@pytest.mark.parametrize("width", [53, 60])
def test_batches_of_different_lengths(architecture, width):
    """Rows with and without cached chunks, padded on the left, and wider than any of them."""
    model = tiny_model(architecture)
    prompts = [tokens(n, seed=n) for n in (53, 20, 9, 33)]
    input_ids, mask = left_padded(prompts, width)
    expected = greedy(model, input_ids, mask)
    droid = door(model, memory())
    fill(droid, prompts[0][:33], prompts[3])
    for _ in range(2):
        answer = droid.generate(input_ids, mask, max_new_tokens=10, do_sample=False)
        assert torch.equal(answer.sequences, expected)
        droid.flush()
    cached = [outcome.exact_tokens for outcome in answer.outcomes]
    assert cached == [48, 16, 0, 32]
    assert [outcome.reason for outcome in answer.outcomes].count(Reason.TOO_SHORT) == 1
