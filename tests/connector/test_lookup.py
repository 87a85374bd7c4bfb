"""Lookup: which chunks of which model serve a prompt, and why not."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch

from droidspeak.connector import Connector, ConnectorOptions, Match, Reason, Status
from droidspeak.errors import ConfigError, TierTimeout, TierUnavailable, UsageError
from droidspeak.layerselect import FrontierPoint, MapFile, Plan, Policy, PolicySet, Requirement
from droidspeak.layerselect.artifact import Side, write_policy
from droidspeak.storage import codecs
from droidspeak.storage.wrappers import FaultyTier, fail

from .models import LAYERS, SIZE, WatchedTier, chunk, fill, keys_of, memory, model, prompt

ME, SENDER, OTHER = model("me"), model("sender"), model("other")
IDS = prompt(4)


def policy(sender=SENDER, plan: str = "0-1", quality: float = 1.0, layers: int = LAYERS) -> Policy:
    point = FrontierPoint(Plan.parse(plan, layers), quality)
    return Policy(sender.source_id, ME.source_id, (point,))


def connector(store, *policies: Policy, **options) -> Connector:
    return Connector(
        store, PolicySet(policies), ConnectorOptions(chunk_size=options.pop("size", SIZE), **options)
    )


def found(match: Match) -> tuple[int, int, str | None, Reason]:
    """Exact tokens, shared tokens, source, reason."""
    assert bool(match) == bool(match.tokens) == (match.reason.status is Status.APPLIED)
    assert match.tokens == match.exact_tokens + match.shared_tokens < max(1, match.length)
    assert (match.plan is None) == (match.source is None) == (match.shared_tokens == 0)
    return match.exact_tokens, match.shared_tokens, match.source, match.reason


# Own chunks


def test_nothing_stored():
    assert found(connector(memory()).lookup(IDS, ME)) == (0, 0, None, Reason.MISS)


def test_own_exact_chunks():
    store = memory()
    keys = fill(store, ME, IDS)
    match = connector(store).lookup(IDS, ME)
    assert found(match) == (4 * SIZE, 0, None, Reason.EXACT_HIT)
    assert [info.key for info in match.exact] == keys
    assert match.length == len(IDS)


def test_own_chunks_up_to_the_first_gap():
    store = memory()
    fill(store, ME, IDS, only=[0, 1, 3])
    assert found(connector(store).lookup(IDS, ME)) == (2 * SIZE, 0, None, Reason.EXACT_HIT)


def test_own_chunks_are_preferred_to_any_policy():
    store = memory()
    fill(store, ME, IDS)
    fill(store, SENDER, IDS)
    watched = WatchedTier(store)
    assert found(connector(watched, policy()).lookup(IDS, ME)) == (4 * SIZE, 0, None, Reason.EXACT_HIT)
    assert len(watched.asked) == 1


@pytest.mark.parametrize(
    ("length", "tokens"), [(4 * SIZE, 3 * SIZE), (4 * SIZE + 1, 4 * SIZE), (SIZE + 1, SIZE)]
)
def test_at_least_one_token_is_left(length, tokens):
    store = memory()
    fill(store, ME, IDS)
    assert connector(store).lookup(IDS[:length], ME).tokens == tokens


@pytest.mark.parametrize("length", [0, 1, SIZE - 1, SIZE])
def test_too_short(length):
    store = WatchedTier(memory())
    assert found(connector(store).lookup(IDS[:length], ME)) == (0, 0, None, Reason.TOO_SHORT)
    assert store.asked == []


def test_other_tokens_are_a_miss():
    store = memory()
    fill(store, ME, IDS)
    changed = [(IDS[0] + 1) % 1000, *IDS[1:]]
    assert found(connector(store).lookup(changed, ME)) == (0, 0, None, Reason.MISS)
    late = [*IDS[:-2], (IDS[-2] + 1) % 1000, IDS[-1]]
    assert found(connector(store).lookup(late, ME)) == (3 * SIZE, 0, None, Reason.EXACT_HIT)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_kinds_of_token_ids(kind):
    store = memory()
    fill(store, ME, IDS)
    assert connector(store).lookup(kind(IDS), ME).exact_tokens == 4 * SIZE


def test_bad_token_ids():
    with pytest.raises(UsageError):
        connector(memory()).lookup([-1] * 40, ME)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_chunk_sizes_do_not_mix(size):
    store = memory()
    fill(store, ME, IDS, size=32)
    match = connector(store, size=size).lookup(IDS, ME)
    assert match.exact_tokens == (64 if size == 32 else 0)
    assert match.chunk_size == size


# Another model's chunks


def test_another_models_chunks_by_policy():
    store = memory()
    keys = fill(store, SENDER, IDS)
    match = connector(store, policy()).lookup(IDS, ME)
    assert found(match) == (0, 4 * SIZE, SENDER.source_id, Reason.CROSS_MODEL_HIT)
    assert [info.key for info in match.shared] == keys
    assert match.plan == Plan.parse("0-1", LAYERS)


def test_without_a_policy_other_models_do_not_exist():
    store = memory()
    fill(store, SENDER, IDS)
    watched = WatchedTier(store)
    assert found(connector(watched).lookup(IDS, ME)) == (0, 0, None, Reason.MISS)
    wrong_way = Policy(ME.source_id, SENDER.source_id, policy().frontier)
    assert found(connector(watched, wrong_way).lookup(IDS, ME)) == (0, 0, None, Reason.MISS)
    assert {key.source for keys in watched.asked for key in keys} == {ME.source_id}


def test_own_chunks_first_then_another_models():
    store = memory()
    mine = fill(store, ME, IDS, only=[0])
    theirs = fill(store, SENDER, IDS, only=[0, 1, 2])
    match = connector(store, policy()).lookup(IDS, ME)
    assert found(match) == (SIZE, 2 * SIZE, SENDER.source_id, Reason.CROSS_MODEL_HIT)
    assert [info.key for info in (*match.exact, *match.shared)] == [mine[0], *theirs[1:3]]


def test_own_chunks_alone_when_nobody_goes_on():
    store = memory()
    fill(store, ME, IDS, only=[0, 1])
    fill(store, SENDER, IDS, only=[0, 1, 3])
    assert found(connector(store, policy()).lookup(IDS, ME)) == (2 * SIZE, 0, None, Reason.EXACT_HIT)


def test_the_longest_source_wins():
    store = memory()
    fill(store, SENDER, IDS, only=[0, 1])
    fill(store, OTHER, IDS, only=[0, 1, 2])
    both = policy(plan="reuse"), policy(OTHER, plan="0-2")
    assert found(connector(store, *both).lookup(IDS, ME))[1:3] == (3 * SIZE, OTHER.source_id)


@pytest.mark.parametrize("order", [1, -1])
def test_fewer_recomputed_layers_win_a_tie(order):
    store = memory()
    fill(store, SENDER, IDS)
    fill(store, OTHER, IDS)
    both = [policy(plan="0-1"), policy(OTHER, plan="0-0")][::order]
    assert connector(store, *both).lookup(IDS, ME).source == OTHER.source_id


def test_the_first_policy_wins_what_is_left():
    store = memory()
    fill(store, SENDER, IDS)
    fill(store, OTHER, IDS)
    assert connector(store, policy(), policy(OTHER)).lookup(IDS, ME).source == SENDER.source_id


def test_e_missing_in_later_chunks_shortens_the_match():
    store = memory()
    fill(store, SENDER, IDS, e_layers=[2], only=[0, 1, 3])
    fill(store, SENDER, IDS, e_layers=[1], only=[2])
    match = connector(store, policy(plan="2-3")).lookup(IDS, ME)
    assert found(match) == (0, 2 * SIZE, SENDER.source_id, Reason.CROSS_MODEL_HIT)


def test_e_missing_in_all():
    store = memory()
    fill(store, SENDER, IDS, e_layers=[1])
    assert found(connector(store, policy(plan="2-3")).lookup(IDS, ME)) == (0, 0, None, Reason.E_MISSING)


def test_e_of_every_transition_layer_is_needed():
    store = memory()
    fill(store, SENDER, IDS, e_layers=[1], only=[0])
    fill(store, SENDER, IDS, e_layers=[1, 3], only=[1])
    both = connector(store, policy(plan="1-1,3-3"))
    assert found(both.lookup(IDS, ME)) == (0, 0, None, Reason.E_MISSING)
    fill(store, SENDER, IDS, e_layers=[1, 3], only=[0])
    assert both.lookup(IDS, ME).shared_tokens == 2 * SIZE


def test_another_source_serves_when_one_lacks_e():
    store = memory()
    fill(store, SENDER, IDS)
    fill(store, OTHER, IDS, only=[0])
    both = policy(plan="2-3"), policy(OTHER, plan="0-2")
    assert found(connector(store, *both).lookup(IDS, ME))[1:3] == (SIZE, OTHER.source_id)


def test_quality_floor():
    store = memory()
    fill(store, SENDER, IDS)
    frontier = tuple(
        FrontierPoint(Plan.parse(text, LAYERS), quality)
        for text, quality in [("reuse", 0.3), ("0-0", 0.8), ("0-2", 0.97)]
    )
    sharing = connector(store, Policy(SENDER.source_id, ME.source_id, frontier))
    plans = {floor: sharing.lookup(IDS, ME, requirement=Requirement(floor)).plan for floor in (0.1, 0.5, 0.9)}
    assert {floor: str(plan) for floor, plan in plans.items()} == {0.1: "reuse", 0.5: "0-0", 0.9: "0-2"}
    assert str(sharing.lookup(IDS, ME).plan) == "0-2"
    below = sharing.lookup(IDS, ME, requirement=Requirement(0.99))
    assert found(below) == (0, 0, None, Reason.BELOW_FLOOR)


def mapping_policy(*points: tuple[str, float]) -> Policy:
    frontier = tuple(FrontierPoint(Plan.parse(text, LAYERS), quality) for text, quality in points)
    return Policy(SENDER.source_id, ME.source_id, frontier, maps=MapFile(Path("maps"), "0" * 64))


@pytest.mark.parametrize(
    ("floor", "with_maps", "without"),
    [(0.3, "reuse", "reuse"), (0.5, "1-1+emap", "0-2"), (0.98, "0-2+kvmap", Reason.MAPS_UNUSABLE)],
)
def test_an_engine_that_cannot_map_passes_over_plans_that_do(floor, with_maps, without):
    store = memory()
    fill(store, SENDER, IDS, e_layers=range(LAYERS))
    points = [("reuse", 0.3), ("1-1+emap", 0.9), ("0-2", 0.97), ("0-2+kvmap", 0.99)]
    policy = mapping_policy(*points)
    told = []
    for maps in (True, False):
        sharing = connector(store, policy)
        if not maps:
            sharing.forgo_maps(SENDER.source_id)
        match = sharing.lookup(IDS, ME, requirement=Requirement(floor))
        told.append(str(match.plan) if match else match.reason)
        assert match.policy in (None, policy)
    assert told == [with_maps, without]


def test_only_plans_that_map():
    store = memory()
    fill(store, SENDER, IDS, e_layers=range(LAYERS))
    sharing = connector(store, mapping_policy(("1-1+emap", 0.9)))
    sharing.forgo_maps(SENDER.source_id)
    assert found(sharing.lookup(IDS, ME, requirement=Requirement(0.9))) == (0, 0, None, Reason.MAPS_UNUSABLE)
    assert found(sharing.lookup(IDS, ME, requirement=Requirement(0.95))) == (0, 0, None, Reason.BELOW_FLOOR)
    # The sender keeps E for engines that can map.
    assert sharing.save(prompt(5)[SIZE:], SENDER).e_layers == {1}


def test_a_plan_that_uses_nothing_of_the_sender_is_no_sharing():
    store = memory()
    fill(store, SENDER, IDS)
    assert found(connector(store, policy(plan="full")).lookup(IDS, ME)) == (0, 0, None, Reason.BELOW_FLOOR)


def test_a_policy_for_another_number_of_layers_does_not_apply():
    store = memory()
    fill(store, SENDER, IDS)
    misfit = connector(store, policy(layers=LAYERS + 1))
    assert found(misfit.lookup(IDS, ME)) == (0, 0, None, Reason.MISS)
    assert found(misfit.lookup(IDS, ME, sender=SENDER)) == (0, 0, None, Reason.NO_POLICY)


def test_telling_reasons_win_over_a_miss():
    store = memory()
    fill(store, OTHER, IDS)
    both = policy(), policy(OTHER, plan="2-3")
    assert connector(store, *both).lookup(IDS, ME).reason is Reason.E_MISSING


# A sender that was asked for


def test_only_the_sender_that_was_asked_for():
    store = memory()
    fill(store, SENDER, IDS, only=[0])
    fill(store, OTHER, IDS)
    both = connector(store, policy(), policy(OTHER))
    assert found(both.lookup(IDS, ME, sender=SENDER))[1:3] == (SIZE, SENDER.source_id)
    assert found(both.lookup(IDS, ME, sender=OTHER))[1:3] == (4 * SIZE, OTHER.source_id)


MISMATCHES = {
    Reason.OTHER_ARCHITECTURE: model("sender", hidden_size=16),
    Reason.OTHER_ROPE: model("sender", rope="other"),
    Reason.OTHER_DTYPE: model("sender", dtype="bfloat16"),
    Reason.OTHER_TOKENIZER: model("sender", tokenizer="other"),
    Reason.OTHER_LAYOUT: model("sender", layout="other"),
}


@pytest.mark.parametrize("reason", MISMATCHES)
def test_incompatible_sender_is_unsupported_with_its_reason(reason, caplog):
    sender, store = MISMATCHES[reason], memory()
    fill(store, SENDER, IDS)
    with caplog.at_level(logging.WARNING):
        match = connector(store, policy(sender)).lookup(IDS, ME, sender=sender)
    assert found(match) == (0, 0, None, reason)
    assert match.reason.status is Status.UNSUPPORTED
    assert reason.value in caplog.text


def test_no_policy():
    store = memory()
    fill(store, SENDER, IDS)
    match = connector(store, policy(OTHER)).lookup(IDS, ME, sender=SENDER)
    assert found(match) == (0, 0, None, Reason.NO_POLICY)


@pytest.mark.parametrize("sender", [SENDER, MISMATCHES[Reason.OTHER_ROPE]])
def test_own_chunks_are_used_whatever_sender_is_asked_for(sender):
    store = memory()
    fill(store, ME, IDS, only=[0])
    assert found(connector(store).lookup(IDS, ME, sender=sender)) == (SIZE, 0, None, Reason.EXACT_HIT)


def test_oneself_as_sender_is_the_own_cache_alone():
    store = memory()
    fill(store, SENDER, IDS)
    sharing = connector(store, policy())
    assert found(sharing.lookup(IDS, ME, sender=ME)) == (0, 0, None, Reason.MISS)
    fill(store, ME, IDS)
    assert found(sharing.lookup(IDS, ME, sender=ME)) == (4 * SIZE, 0, None, Reason.EXACT_HIT)


def test_unknown_receiver():
    store = WatchedTier(memory())
    match = connector(store, policy()).lookup(IDS, None, sender=SENDER)
    assert found(match) == (0, 0, None, Reason.UNKNOWN_WEIGHTS)
    assert store.asked == []


# Opting out, tenants


def test_opted_out():
    store = memory()
    fill(store, SENDER, IDS)
    sharing = connector(store, policy())
    assert found(sharing.lookup(IDS, ME, share=False)) == (0, 0, None, Reason.OPTED_OUT)
    fill(store, ME, IDS, only=[0])
    assert found(sharing.lookup(IDS, ME, share=False)) == (SIZE, 0, None, Reason.EXACT_HIT)


def test_salt_isolates():
    store = memory()
    fill(store, ME, IDS, salt="one")
    fill(store, SENDER, IDS, salt="one")
    sharing = connector(store, policy())
    assert sharing.lookup(IDS, ME, salt="one").exact_tokens == 4 * SIZE
    for salt in ("", "two", "One", "one "):
        assert found(sharing.lookup(IDS, ME, salt=salt)) == (0, 0, None, Reason.MISS)


@pytest.mark.parametrize(("degrees", "found"), [((), False), ((2, 4), False), ((1,), True)])
def test_degrees_that_may_be_read(degrees, found):
    store = memory()
    fill(store, ME, IDS)
    assert connector(store, shard="0of1", degrees=degrees).lookup(IDS, ME)
    assert bool(connector(store, shard="0of2", degrees=degrees).lookup(IDS, ME)) is found


def test_degrees_go_on_where_others_end():
    store = memory()
    keys = fill(store, ME, IDS, only=[0, 3])
    for index in (1, 2):
        half = replace(keys[index], shard="0of2")
        store.write(chunk(ME, half, index))
    match = connector(store).lookup(IDS, ME)
    assert [info.key.shard for info in match.exact] == ["0of1", "0of2", "0of2", "0of1"]


def test_heads_that_cannot_be_split_are_not_asked_for():
    store = WatchedTier(memory())
    connector(store, degrees=(1, 2, 3, 4)).lookup(IDS, model("me", kv_heads=6))
    assert [keys[0].shard for keys in store.asked] == ["0of1", "0of2", "0of3"]


# A store that fails


@pytest.mark.parametrize("error", [TierUnavailable("down"), TierTimeout("slow")])
@pytest.mark.parametrize("share", [True, False])
def test_store_down(error, share):
    store = FaultyTier(memory(), {"leading": repeat(fail(error))})
    down = connector(store, policy())
    assert found(down.lookup(IDS, ME, share=share)) == (0, 0, None, Reason.STORE_UNAVAILABLE)
    assert down.counters.get("lookup_failures") == (2 if share else 1)


def test_own_part_is_used_when_the_store_fails_after_it():
    inner = memory()
    fill(inner, ME, IDS, only=[0])
    store = FaultyTier(inner, {"leading": [None, fail(TierUnavailable("down"))]})
    assert found(connector(store, policy()).lookup(IDS, ME)) == (SIZE, 0, None, Reason.EXACT_HIT)


def test_another_model_serves_when_the_own_lookup_fails():
    inner = memory()
    fill(inner, SENDER, IDS)
    store = FaultyTier(inner, {"leading": [fail(TierUnavailable("down")), None]})
    assert connector(store, policy()).lookup(IDS, ME).shared_tokens == 4 * SIZE


def test_one_question_per_source_and_a_short_one_per_other_degree():
    store = WatchedTier(memory())
    connector(store, policy(), policy(OTHER), degrees=(2,)).lookup(IDS, ME)
    expected = []
    for source in (ME, SENDER, OTHER):
        keys = keys_of(source, IDS)
        expected += [keys, [replace(keys[0], shard="0of2")]]
    assert store.asked == expected


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 17}, "powers of two"),
        ({"codec": "gzip"}, "unknown codec"),
        ({"loaders": 0}, "positive"),
        ({"load_deadline": 0}, "positive"),
        ({"load_deadline": float("nan")}, "positive"),
        ({"shard": "2of2"}, "rank below"),
        ({"shard": "first"}, "rank below"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        ConnectorOptions(**options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def lossy(monkeypatch):
    """The name of a codec that loses bits."""

    class Lossy(codecs.RawCodec):
        name = "lossy"
        lossless = False

    monkeypatch.setitem(codecs._CODECS, "lossy", Lossy)
    return "lossy"


def test_lossy_codecs_are_refused(lossy):
    with pytest.raises(ConfigError, match="lossy"):
        ConnectorOptions(codec=lossy)


def test_without_chunks():
    store = memory()
    fill(store, SENDER, IDS)
    match = connector(store, policy()).lookup(IDS, ME)
    empty = match.without_chunks(Reason.CORRUPT)
    assert found(empty) == (0, 0, None, Reason.CORRUPT)
    assert empty == replace(match, reason=Reason.CORRUPT, shared=(), plan=None, source=None, policy=None)


# Policies that are refused, and codecs that lose bits


@pytest.fixture
def refused(tmp_path):
    """A folder whose only policy, SENDER -> ME, was changed by hand."""
    sides = Side.of("sender", SENDER), Side.of("me", ME)
    path = tmp_path / "policy.json"
    write_policy(path, policy(), *sides)
    path.write_text(path.read_text().replace('"0-1"', '"0-0"'))
    return PolicySet.from_folder(tmp_path)


def test_a_refused_policy_is_unsupported(refused):
    store = memory()
    sharing = Connector(store, refused, ConnectorOptions(chunk_size=SIZE))
    assert found(sharing.lookup(IDS, ME)) == (0, 0, None, Reason.MISS)
    assert found(sharing.lookup(IDS, ME, sender=SENDER)) == (0, 0, None, Reason.POLICY_REFUSED)
    fill(store, SENDER, IDS)
    match = sharing.lookup(IDS, ME)
    assert found(match) == (0, 0, None, Reason.POLICY_REFUSED)
    assert match.reason.status is Status.UNSUPPORTED
    assert found(sharing.lookup(IDS, ME, sender=OTHER)) == (0, 0, None, Reason.NO_POLICY)
    assert found(sharing.lookup(prompt(4, seed=1), SENDER, sender=ME)) == (0, 0, None, Reason.NO_POLICY)


def test_a_refused_policy_keeps_nobody_else_from_sharing(refused):
    store = memory()
    fill(store, SENDER, IDS)
    refused.add(policy(OTHER))
    sharing = Connector(store, refused, ConnectorOptions(chunk_size=SIZE))
    assert found(sharing.lookup(IDS, ME, sender=OTHER)) == (0, 0, None, Reason.MISS)
    fill(store, OTHER, IDS, only=[0, 1])
    assert found(sharing.lookup(IDS, ME)) == (0, 2 * SIZE, OTHER.source_id, Reason.CROSS_MODEL_HIT)
    fill(store, ME, IDS, only=[0])
    assert found(sharing.lookup(IDS, ME, sender=SENDER)) == (SIZE, 0, None, Reason.EXACT_HIT)


def test_lossy_chunks_need_a_policy_that_was_profiled_with_their_codec(lossy):
    store = memory()
    fill(store, SENDER, IDS, only=[0, 1], codec="zstd")
    fill(store, SENDER, IDS, only=[2, 3], codec=lossy)
    for codec, chunks in ((None, 2), ("other", 2), (lossy, 4)):
        sharing = connector(store, replace(policy(), codec=codec))
        assert sharing.lookup(IDS, ME).shared_tokens == chunks * SIZE
    fill(store, SENDER, IDS, only=[0], codec=lossy)
    assert found(connector(store, policy()).lookup(IDS, ME)) == (0, 0, None, Reason.LOSSY_CODEC)
