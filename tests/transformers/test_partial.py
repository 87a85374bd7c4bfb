"""Partial prefill from tensors at hand, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from droidspeak.errors import LoadFailed, UsageError
from droidspeak.integrations.transformers import Decoder, PrefixKV, capture, partial_prefill
from droidspeak.layerselect import Action, Plan

from .sharing import partial_plans
from .tiny_models import HIDDEN, tiny_model, tokens

IDS = tokens(24, seed=1)
ARCHITECTURES = ["llama", "gemma2"]


def assert_equal(got, want):
    for (k, v), (want_k, want_v) in zip(got, want, strict=True):
        assert torch.equal(k, want_k)
        assert torch.equal(v, want_v)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_senders_layers_and_the_receivers_groups(architecture):
    sender, receiver = tiny_model(architecture, seed=2), tiny_model(architecture)
    decoder = Decoder(receiver)
    sent = capture(sender, IDS, range(decoder.num_layers))
    for plan in [*partial_plans(decoder.num_layers), Plan.parse("0-0,2-2", decoder.num_layers)]:
        expected = list(sent.layers)
        for group in plan.groups:
            e = sent.e(group.start) if group.start else None
            expected[group.start : group.end + 1] = decoder.recompute(IDS, group.start, group.end, e=e)
        assert_equal(partial_prefill(plan, receiver, IDS, sent), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputing_all_is_the_receivers_own_prefill(architecture):
    receiver = tiny_model(architecture)
    plan = Plan.parse("full", Decoder(receiver).num_layers)
    assert_equal(partial_prefill(plan, receiver, IDS, PrefixKV()), capture(receiver, IDS).layers)


@pytest.mark.parametrize("exact", [1, 11, 23])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_after_exact_tokens(architecture, exact):
    """Own rows stay as they are in every layer; recomputed rows attend to them."""
    sender, receiver = tiny_model(architecture, seed=2), tiny_model(architecture)
    decoder = Decoder(receiver)
    own = capture(decoder, IDS[:exact])
    sent = capture(sender, IDS, range(decoder.num_layers))
    source = PrefixKV(
        [
            tuple(torch.cat([mine, theirs[exact:]]) for mine, theirs in zip(*pairs, strict=True))
            for pairs in zip(own.layers, sent.layers, strict=True)
        ],
        {layer: e[exact:] for layer, e in sent.inputs.items()},
    )
    for plan in partial_plans(decoder.num_layers):
        got = partial_prefill(plan, decoder, IDS, source, exact_tokens=exact)
        expected = list(source.layers)
        for group in plan.groups:
            e = source.e(group.start) if group.start else None
            fresh = decoder.recompute(IDS[exact:], group.start, group.end, e=e, past=own.layers)
            for layer, kv in zip(group, fresh, strict=True):
                expected[layer] = tuple(map(torch.cat, zip(own.layers[layer], kv, strict=True)))
        assert_equal(got, expected)


@pytest.mark.parametrize("exact", [0, 11])
def test_the_source_is_only_read(exact):
    receiver = tiny_model("llama")
    source = capture(tiny_model("llama", seed=2), IDS, [1])
    source.inputs[1] = source.inputs[1][exact:]
    before = [(k.clone(), v.clone()) for k, v in source.layers]
    first = partial_prefill(Plan.parse("1-2", 4), receiver, IDS, source, exact_tokens=exact)
    assert_equal(source.layers, before)
    assert_equal(partial_prefill(Plan.parse("1-2", 4), receiver, IDS, source, exact_tokens=exact), first)


class Diary:
    """A source that notes what it is asked for, in which order."""

    def __init__(self, source: PrefixKV) -> None:
        self.source, self.asked = source, []

    def e(self, layer):
        self.asked.append(f"e{layer}")
        return self.source.e(layer)

    def kv(self, layer):
        self.asked.append(f"kv{layer}")
        return self.source.kv(layer)


def test_groups_come_first_and_nothing_else_is_asked_for():
    receiver = tiny_model("llama")
    diary = Diary(capture(tiny_model("llama", seed=2), IDS, [1]))
    partial_prefill(Plan.parse("1-2", 4), receiver, IDS, diary)
    assert diary.asked == ["e1", "kv0", "kv3"]
    diary.asked.clear()
    diary.source.inputs[1] = diary.source.inputs[1][8:]
    partial_prefill(Plan.parse("1-2", 4), receiver, IDS, diary, exact_tokens=8)
    assert diary.asked == ["e1", "kv1", "kv2", "kv0", "kv3"]


def test_capture_keeps_the_e_that_was_asked_for():
    model = tiny_model("llama")
    prefix = capture(model, IDS, [0, 2])
    assert sorted(prefix.inputs) == [0, 2]
    assert prefix.e(2).shape == (len(IDS), HIDDEN)
    with pytest.raises(UsageError, match=r"E of layer 1 was not captured; captured: \[0, 2\]"):
        prefix.e(1)
    with pytest.raises(UsageError, match="captured: none"):
        capture(model, IDS).e(1)


def test_plans_that_do_not_fit():
    model, source = tiny_model("llama"), PrefixKV()
    with pytest.raises(UsageError, match="plan of 5 layers for a model of 4"):
        partial_prefill(Plan.parse("reuse", 5), model, IDS, source)
    with pytest.raises(UsageError, match="needs the maps"):
        partial_prefill(Plan((Action.MAP, *[Action.REUSE] * 3)), model, IDS, source)
    with pytest.raises(UsageError, match="E must be"):
        partial_prefill(Plan.parse("1-2", 4), model, IDS, PrefixKV(inputs={1: torch.zeros(3, HIDDEN)}))


def test_a_source_that_fails_ends_it():
    class Broken(PrefixKV):
        def kv(self, layer):
            raise LoadFailed("corrupt", "x")

    with pytest.raises(LoadFailed):
        partial_prefill(Plan.parse("0-1", 4), tiny_model("llama"), IDS, Broken())
