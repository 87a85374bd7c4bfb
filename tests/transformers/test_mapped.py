"""Keys without their position, mapped sources, and mapped plans through the door."""

from __future__ import annotations

import hashlib
import logging
import os

import pytest
import torch
from transformers import CohereConfig, SmolLM3Config
from transformers.models.auto import AutoModelForCausalLM

from droidspeak.connector import Reason, Status
from droidspeak.errors import MapsUnusable, UsageError
from droidspeak.integrations.transformers import Decoder, PrefixKV, capture, partial_prefill
from droidspeak.integrations.transformers.mapped import mapped_source
from droidspeak.integrations.transformers.rotary import DecoderRotary
from droidspeak.layerselect import FrontierPoint, MapFile, Plan, Policy, PolicySet
from droidspeak.layerselect.mapfeatures import columns
from droidspeak.layerselect.mapping import MapFeatures, Maps
from droidspeak.layerselect.ridge import LinearMap
from droidspeak.storage.disk import DiskTier

from .sharing import SIZE, ask, door, fill, greedy, memory
from .tiny_models import _SHAPE, ARCHITECTURES, HIDDEN, tiny_model, tokens

IDS = tokens(4 * SIZE + 5, seed=1)
MINE, THEIRS = tiny_model("llama"), tiny_model("llama", seed=7)
PLANS = ["1-2+emap", "1-2+emap+kvmap:0", "1-2+kvmap", "reuse+kvmap", "1-1,3-3+emap+kvmap"]


# Rotary

ROPES = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def models():
    """Every architecture, and what rotary embeddings may look like besides."""
    yield from ((name, "plain", {}) for name in ARCHITECTURES)
    yield "phi3", "partial", {"partial_rotary_factor": 0.5}
    yield from (
        ("llama", name, {"rope_parameters": {"rope_theta": 10000.0, **rope}, "max_position_embeddings": 32})
        for name, rope in ROPES.items()
    )


@pytest.fixture(params=list(models()), ids=lambda given: "-".join(given[:2]))
def decoder(request):
    architecture, _, changes = request.param
    return Decoder(tiny_model(architecture, **changes))


def test_unrotated_keys_do_not_depend_on_the_position(decoder):
    DecoderRotary(decoder).verify()


def test_keys_of_later_positions_are_unrotated_from_there(decoder):
    """A token has the same key in layer 0 wherever it stands."""
    ids = tokens(24, seed=3)
    ids[20] = ids[2]
    k, _ = capture(decoder, ids, end=0).kv(0)
    rotary = DecoderRotary(decoder)
    early, late = rotary.unrotate(k[:4], 0)[2], rotary.unrotate(k[18:], 0, 18)[2]
    assert torch.allclose(early, late, atol=1e-4)
    assert not torch.allclose(k[2], k[20], atol=1e-2)


@pytest.mark.parametrize("first", [0, 7])
def test_rotating_undoes_unrotating(decoder, first):
    rotary, own = DecoderRotary(decoder), capture(decoder, IDS)
    for layer in range(decoder.num_layers):
        k = own.kv(layer)[0][first:]
        assert torch.allclose(rotary.rotate(rotary.unrotate(k, layer, first), layer, first), k, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "layer"),
    [(CohereConfig(**_SHAPE), 0), (SmolLM3Config(**_SHAPE, no_rope_layers=[1, 1, 0, 1]), 2)],
    ids=["other pairs of components", "a layer without rotary embedding"],
)
def test_keys_that_are_rotated_otherwise_are_noticed(config, layer):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    name = type(model).__name__
    with pytest.raises(UsageError, match=rf"keys of {name} \(layer {layer}\) cannot be un-rotated"):
        DecoderRotary(Decoder(model)).verify()


def test_embeddings_are_those_that_layer_0_sees():
    decoder = Decoder(tiny_model("gemma2"))
    embedded = decoder.model.model.embed_tokens.weight[IDS]
    assert torch.equal(decoder.embed(IDS), capture(decoder, IDS, [0]).e(0))
    assert not torch.allclose(decoder.embed(IDS), embedded, atol=1e-2)


# Mapped sources


def random_maps(
    kind: MapFeatures = MapFeatures.EMBEDDING, *, heads: int = 2, dim: int = 8, hidden: int = HIDDEN
) -> Maps:
    """Maps of all layers of a tiny llama; what they say makes no sense."""
    source = torch.Generator().manual_seed(5)

    def linear(mapped: int, outputs: int) -> LinearMap:
        features = columns(kind, mapped, hidden)
        weight = torch.randn(features, outputs, generator=source) / features**0.5
        return LinearMap(weight, torch.randn(outputs, generator=source) / 4)

    kv = 2 * heads * dim
    return Maps(
        kind,
        {layer: linear(2 * hidden, hidden) for layer in range(4)},
        {layer: linear(kv, kv) for layer in range(4)},
    )


def mapped_by_hand(plan: Plan, maps: Maps, source: PrefixKV, exact: int, end: int):
    """What `plan` says, put together from the primitives of decoder, rotary and maps."""
    decoder = Decoder(MINE)
    rotary, embeddings = DecoderRotary(decoder), decoder.embed(IDS[:end])
    layers = list(source.layers)
    for layer in plan.mapped:
        k, v = (states[exact:] for states in source.kv(layer))
        k, v = maps.map_kv(layer, rotary.unrotate(k, layer, exact), v, embeddings)
        k = rotary.rotate(k, layer, exact)
        layers[layer] = tuple(
            torch.cat([own[:exact], new]) for own, new in zip(source.kv(layer), (k, v), strict=True)
        )
    past = [(k[:exact], v[:exact]) for k, v in source.layers] if exact else []
    for group in plan.groups:
        e = maps.map_e(group.start, source.e(group.start), embeddings) if plan.map_e else None
        e = source.e(group.start) if e is None else e
        for layer, new in zip(
            group, decoder.recompute(IDS[exact:end], group.start, group.end, e=e, past=past), strict=True
        ):
            layers[layer] = tuple(
                torch.cat([own[:exact], rows]) for own, rows in zip(source.kv(layer), new, strict=True)
            )
    return layers


def mixed_source(exact: int, end: int) -> PrefixKV:
    """Own K and V of the first tokens, the sender's of the others."""
    sent = capture(THEIRS, IDS[:end], range(4))
    own = capture(MINE, IDS[:exact]).layers if exact else []
    layers = (
        [
            tuple(torch.cat([mine, theirs[exact:]]) for mine, theirs in zip(*pairs, strict=True))
            for pairs in zip(own, sent.layers, strict=True)
        ]
        if exact
        else sent.layers
    )
    return PrefixKV(layers, {layer: e[exact:] for layer, e in sent.inputs.items()})


def assert_close(got, want):
    for (k, v), (want_k, want_v) in zip(got, want, strict=True):
        assert torch.allclose(k, want_k, atol=1e-5)
        assert torch.allclose(v, want_v, atol=1e-5)


@pytest.mark.parametrize("exact", [0, 11])
@pytest.mark.parametrize("text", PLANS)
@pytest.mark.parametrize("kind", MapFeatures)
def test_partial_prefill_follows_plans_that_map(kind, text, exact):
    plan, maps, source = Plan.parse(text, 4), random_maps(kind), mixed_source(exact, 40)
    got = partial_prefill(plan, MINE, IDS[:40], source, exact_tokens=exact, maps=maps)
    assert_close(got, mapped_by_hand(plan, maps, source, exact, 40))
    for (k, v), (own_k, own_v) in zip(got, source.layers, strict=True):
        assert torch.equal(k[:exact], own_k[:exact])
        assert torch.equal(v[:exact], own_v[:exact])


def test_the_first_mapped_token_sees_the_exact_ones_before_it():
    source, maps = mixed_source(11, 40), random_maps()
    mapped = mapped_source(source, maps, Decoder(MINE), IDS[:40], 11)
    other = IDS[:40].clone()
    other[10] = 5 + other[10] % 50
    assert not torch.allclose(mapped.e(1)[0], mapped_source(source, maps, Decoder(MINE), other, 11).e(1)[0])


def test_what_a_plan_does_not_map_stays_the_senders():
    source = mixed_source(0, 40)
    before = [(k.clone(), v.clone()) for k, v in source.layers]
    got = partial_prefill(Plan.parse("2-3+emap+kvmap:1", 4), MINE, IDS[:40], source, maps=random_maps())
    assert torch.equal(got[0][0], before[0][0])
    assert not torch.allclose(got[1][0], before[1][0], atol=1e-2)
    assert_close(source.layers, before)


def test_mapped_tensors_keep_the_dtype_of_the_cache():
    model = tiny_model("llama").bfloat16()
    sent = capture(tiny_model("llama", seed=7).bfloat16(), IDS, [1])
    mapped = mapped_source(sent, random_maps(), Decoder(model), IDS)
    assert {tensor.dtype for tensor in (mapped.e(1), *mapped.kv(3))} == {torch.bfloat16}


def test_maps_that_are_lacking_are_noticed_before_anything_is_asked_for():
    class Silent:
        def e(self, layer):
            raise AssertionError

        kv = e

    plan, maps = Plan.parse("1-2+emap", 4), random_maps()
    with pytest.raises(UsageError, match=r"plan 1-2\+emap maps: it needs the maps"):
        partial_prefill(plan, MINE, IDS, Silent())
    with pytest.raises(MapsUnusable, match=r"e\.1"):
        partial_prefill(plan, MINE, IDS, Silent(), maps=Maps(maps.features, {}, maps.kv))


# The door


def mapped_pair(place, plan: str, maps: Maps, store=None):
    """Sender and receiver on one store, a policy that maps, and its file."""
    store, policies = store or memory(), PolicySet()
    sender, receiver = door(THEIRS, store, policies), door(MINE, store, policies)
    file = maps.save(place / "maps.safetensors")
    policies.add(policy(sender, receiver, plan, file))
    return sender, receiver, file


def policy(sender, receiver, plan: str, file: MapFile) -> Policy:
    point = FrontierPoint(Plan.parse(plan, 4), 1.0)
    return Policy(sender.manifest.source_id, receiver.manifest.source_id, (point,), maps=file)


@pytest.mark.parametrize("exact", [0, SIZE])
@pytest.mark.parametrize("text", PLANS)
@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_a_mapped_plan_through_the_door(tier, text, exact, tmp_path):
    store = DiskTier(tmp_path / "store", min_free=0) if tier == "disk" else memory()
    with store:
        sender, receiver, _ = mapped_pair(tmp_path, text, random_maps(), store)
        if exact:
            fill(receiver, IDS[: exact + 1])
        fill(sender, IDS)
        prefix = receiver.prefill(IDS)
        outcome = prefix.outcome
        assert (outcome.reason, outcome.exact_tokens, prefix.tokens) == (
            Reason.CROSS_MODEL_HIT,
            exact,
            4 * SIZE,
        )
        end = 4 * SIZE
        plan, source = Plan.parse(text, 4), mixed_source(exact, end)
        expected = partial_prefill(plan, MINE, IDS[:end], source, exact_tokens=exact, maps=random_maps())
        assert_close(prefix.layers, expected)


def overwritten(file: MapFile) -> MapFile:
    file.path.write_bytes(file.path.read_bytes()[:-1] + b"\x01")
    return file


def removed(file: MapFile) -> MapFile:
    file.path.unlink()
    return file


def of_another_model(file: MapFile) -> MapFile:
    return random_maps(heads=1).save(file.path)


def without_a_layer(file: MapFile) -> MapFile:
    held = random_maps()
    return Maps(held.features, {2: held.e[2]}, held.kv).save(file.path)


def of_another_pair(file: MapFile) -> MapFile:
    held = random_maps()
    return Maps(held.features, held.e, held.kv, ("a" * 64, "b" * 64)).save(file.path)


def not_finite(file: MapFile) -> MapFile:
    held = random_maps()
    held.e[1].weight[3, 3] = float("nan")
    return held.save(file.path)


DAMAGES = [overwritten, removed, of_another_model, without_a_layer, of_another_pair, not_finite]


@pytest.mark.parametrize("exact", [0, SIZE])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_maps_that_cannot_be_used_cost_the_cache_and_not_the_answer(damage, exact, tmp_path, caplog):
    sender, receiver, file = mapped_pair(tmp_path, "1-2+emap+kvmap:0", random_maps())
    if exact:
        fill(receiver, IDS[: exact + 1])
    fill(sender, IDS)
    receiver.connector.policies.add(policy(sender, receiver, "1-2+emap+kvmap:0", damage(file)))
    with caplog.at_level(logging.WARNING):
        sequences, outcome = ask(receiver, IDS)
    assert (outcome.reason, outcome.status) == (Reason.MAPS_UNUSABLE, Status.UNSUPPORTED)
    assert (outcome.exact_tokens, outcome.shared_tokens) == (0, 0)
    assert torch.equal(sequences, greedy(MINE, IDS[None]))
    assert "map" in caplog.text
    # What was prefilled instead is exact, and serves the next request.
    receiver.flush()
    assert ask(receiver, IDS)[1].reason is Reason.EXACT_HIT


def test_maps_that_are_mended_are_used_again(tmp_path):
    sender, receiver, file = mapped_pair(tmp_path, "1-2+emap", random_maps())
    fill(sender, IDS, tokens(2 * SIZE + 3, seed=8))
    sound = file.path.read_bytes()
    file.path.write_bytes(b"nothing")
    os.utime(file.path, ns=(1, 1))
    assert ask(receiver, IDS)[1].reason is Reason.MAPS_UNUSABLE
    file.path.write_bytes(sound)
    assert hashlib.sha256(sound).hexdigest() == file.sha256
    assert ask(receiver, tokens(2 * SIZE + 3, seed=8))[1].reason is Reason.CROSS_MODEL_HIT


def test_a_plan_that_does_not_map_needs_no_file(tmp_path):
    sender, receiver, file = mapped_pair(tmp_path, "1-2", random_maps())
    fill(sender, IDS)
    removed(file)
    assert ask(receiver, IDS)[1].reason is Reason.CROSS_MODEL_HIT
