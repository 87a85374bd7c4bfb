"""Saving: only whole chunks, only the model's own rows, and never a trouble for the engine."""

from __future__ import annotations

import threading
from itertools import repeat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from droidspeak.connector import Connector, ConnectorOptions, SaveSession
from droidspeak.errors import TierFull, TierTimeout, TierUnavailable, UsageError
from droidspeak.layerselect import Plan, Policy, PolicySet
from droidspeak.storage import Slot, SlotKind
from droidspeak.storage.keys import salt_tag
from droidspeak.storage.testing import assert_holds
from droidspeak.storage.wrappers import FaultyTier, WrapperTier, fail

from .models import DIM, HEADS, HIDDEN, LAYERS, SIZE, chunk, fill, keys_of, memory, model, prompt, rows

ME, RECEIVER = model("me"), model("receiver")
CHUNKS = 3
IDS = prompt(CHUNKS)
TOTAL = CHUNKS * SIZE


def connector(store, *plans: str, **options) -> Connector:
    """Of a model whose caches others use by these plans."""
    policies = [
        Policy.fixed(ME.source_id, f"{n:064x}", Plan.parse(plan, LAYERS)) for n, plan in enumerate(plans)
    ]
    return Connector(store, PolicySet(policies), ConnectorOptions(chunk_size=SIZE, **options))


KINDS = (SlotKind.K, SlotKind.V, SlotKind.E)


def put(session: SaveSession, layer: int, start: int = 0, stop: int = TOTAL, *, with_e: bool = True) -> None:
    k, v, e = (rows(ME, Slot(kind, layer), stop)[start:] for kind in KINDS)
    session.put(layer, k, v, e if with_e else None, start=start)


def put_all(session: SaveSession, start: int = 0, stop: int = TOTAL) -> None:
    for layer in range(LAYERS):
        put(session, layer, start, stop)


def assert_stored(store, numbers, e_layers=(), *, ids=IDS, codec="raw") -> None:
    """Exactly these chunks of the prompt, whole and right."""
    keys = keys_of(ME, ids)
    assert set(store.keys()) == {keys[n] for n in numbers}
    for n in numbers:
        assert_holds(store.read(keys[n]), chunk(ME, keys[n], n, e_layers, codec=codec))


# What is published


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_whole_prefill(codec):
    store = memory()
    saving = connector(store, "1-2", codec=codec)
    session = saving.save(IDS, ME)
    assert (session.wanted, session.e_layers) == (True, {1})
    put_all(session)
    assert not session.wanted
    assert session.finish(wait=True) == CHUNKS
    assert_stored(store, range(CHUNKS), [1], codec=codec)
    assert saving.counters.snapshot() == {"chunks_saved": {"": CHUNKS}}


@settings(max_examples=40)
@given(data=st.data())
def test_layers_in_any_order_and_rows_in_pieces(data):
    store = memory()
    session = connector(store, "1-1,3-3").save(IDS, ME)
    cuts = sorted(data.draw(st.sets(st.integers(1, TOTAL - 1), max_size=3)))
    pieces = list(zip([0, *cuts], [*cuts, TOTAL], strict=True))
    for layer, piece in data.draw(st.permutations([(n, p) for n in range(LAYERS) for p in pieces])):
        put(session, layer, *piece)
    assert session.finish(wait=True) == CHUNKS
    assert_stored(store, range(CHUNKS), [1, 3])


@settings(max_examples=20)
@given(st.sets(st.integers(0, TOTAL - 1), min_size=1, max_size=3), st.integers(0, LAYERS - 1))
def test_a_missing_row_keeps_its_chunk_back(missing, layer):
    store = memory()
    saving = connector(store)
    session = saving.save(IDS, ME)
    for n in range(LAYERS):
        for row in range(TOTAL):
            if n != layer or row not in missing:
                put(session, n, row, row + 1)
    broken = {row // SIZE for row in missing}
    assert session.finish(wait=True) == CHUNKS - len(broken)
    assert_stored(store, set(range(CHUNKS)) - broken)
    assert saving.counters.get("chunks_abandoned") == len(broken)


def test_chunked_prefill_publishes_as_it_goes():
    store = memory()
    saving = connector(store)
    session = saving.save(IDS, ME)
    for stop in range(10, TOTAL + 10, 10):
        put_all(session, stop - 10, min(stop, TOTAL))
        saving.flush()
        assert store.usage().chunks == min(stop, TOTAL) // SIZE


def test_rows_that_come_twice_before_their_chunk_is_whole():
    store = memory()
    session = connector(store).save(IDS, ME)
    put_all(session, 0, 10)
    put_all(session, 0, 24)
    put_all(session, 5, TOTAL)
    assert session.finish(wait=True) == CHUNKS
    assert_stored(store, range(CHUNKS))


def test_a_prefill_that_starts_over_publishes_once():
    store = memory()
    saving = connector(store)
    session = saving.save(IDS, ME)
    put_all(session, 0, 40)
    put_all(session)
    assert session.finish(wait=True) == CHUNKS
    assert saving.counters.snapshot() == {"chunks_saved": {"": CHUNKS}}


@pytest.mark.parametrize("extra", [0, 1, SIZE - 1])
def test_only_full_chunks(extra):
    store = memory()
    ids = prompt(2, extra)
    session = connector(store).save(ids, ME)
    put_all(session, 0, len(ids))
    session.finish(wait=True)
    assert_stored(store, range(2), ids=ids)


def test_a_prompt_without_a_full_chunk():
    session = connector(memory()).save(IDS[: SIZE - 1], ME)
    assert (session.wanted, session.e_layers) == (False, set())
    put_all(session, 0, SIZE - 1)
    assert session.finish(wait=True) == 0


def test_e_that_nobody_needs_is_not_kept():
    store = memory()
    session = connector(store).save(IDS, ME)
    assert session.e_layers == set()
    put_all(session)
    session.finish(wait=True)
    assert_stored(store, range(CHUNKS))


def test_e_that_is_missing_keeps_all_back():
    store = memory()
    saving = connector(store, "1-2", "3-3")
    session = saving.save(IDS, ME)
    for layer in range(LAYERS):
        put(session, layer, with_e=layer != 3)
    assert session.finish(wait=True) == 0
    assert saving.counters.snapshot() == {"chunks_abandoned": {"": CHUNKS}}
    assert store.usage().chunks == 0


def test_a_layer_that_is_missing_keeps_all_back():
    store = memory()
    saving = connector(store)
    session = saving.save(IDS, ME)
    for layer in (0, 1, 3):
        put(session, layer)
    put(session, LAYERS)
    assert session.finish(wait=True) == 0
    assert saving.counters.get("chunks_abandoned") == CHUNKS
    assert store.usage().chunks == 0


@pytest.mark.parametrize(
    "spoil",
    [lambda t: t.half(), lambda t: t[:, :1], lambda t: t.transpose(1, 2), lambda t: t.to(torch.float64)],
)
def test_rows_that_do_not_fit_the_manifest_are_not_saved(spoil):
    store = memory()
    saving = connector(store)
    session = saving.save(IDS, ME)
    for layer in range(LAYERS):
        k, v = (rows(ME, slot, TOTAL) for slot in Slot.kv([layer]))
        session.put(layer, k, spoil(v) if layer == 2 else v)
    assert session.finish(wait=True) == 0
    assert saving.counters.snapshot() == {"chunks_abandoned": {"": CHUNKS}}


def test_what_comes_after_the_end_is_ignored():
    store = memory()
    saving = connector(store)
    session = saving.save(IDS, ME)
    put_all(session, 0, 20)
    assert session.finish(wait=True) == 1
    put_all(session)
    assert session.finish(wait=True) == 1
    saving.flush()
    assert_stored(store, [0])


def test_the_engine_may_overwrite_its_tensors_at_once():
    store = memory()
    session = connector(store, "1-2").save(IDS, ME)
    page = {slot: torch.empty(TOTAL, *shape) for slot, shape in _pages().items()}
    for layer in range(LAYERS):
        for kind in KINDS:
            page[kind].copy_(rows(ME, Slot(kind, layer), TOTAL))
        session.put(layer, page[SlotKind.K], page[SlotKind.V], page[SlotKind.E])
        for tensor in page.values():
            tensor.fill_(-1)
    session.finish(wait=True)
    assert_stored(store, range(CHUNKS), [1])


def _pages():
    return {SlotKind.K: (HEADS, DIM), SlotKind.V: (HEADS, DIM), SlotKind.E: (HIDDEN,)}


# What is stored already


def test_stored_chunks_are_skipped():
    store = memory()
    fill(store, ME, IDS, only=[0, 1])
    saving = connector(store)
    session = saving.save(IDS, ME)
    put_all(session)
    assert session.finish(wait=True) == 1
    assert_stored(store, range(CHUNKS))
    again = saving.save(IDS, ME)
    assert not again.wanted


def test_rows_of_stored_chunks_need_not_come():
    store = memory()
    fill(store, ME, IDS, only=[0, 1])
    session = connector(store).save(IDS, ME)
    put_all(session, 2 * SIZE)
    assert session.finish(wait=True) == 1


def test_stored_chunks_are_stored_again_when_a_policy_needs_more_e():
    store = memory()
    fill(store, ME, IDS, [1], only=[0])
    fill(store, ME, IDS, [1, 3], only=[1])
    fill(store, ME, IDS, only=[2])
    session = connector(store, "1-1", "3-3").save(IDS, ME)
    put_all(session)
    assert session.finish(wait=True) == 2
    assert_stored(store, range(CHUNKS), [1, 3])
    assert not connector(store, "1-2").save(IDS, ME).wanted


def test_salt_and_shard_name_other_chunks():
    store = memory()
    fill(store, ME, IDS)
    assert connector(store).save(IDS, ME, salt="tenant").wanted
    assert connector(store, shard="0of2").save(IDS, ME).wanted


def test_the_tag_of_the_salt_is_kept_and_the_salt_is_not():
    store = memory()
    for salt in ("", "tenant"):
        session = connector(store).save(IDS, ME, salt=salt)
        put_all(session)
        assert session.finish(wait=True) == CHUNKS
    chunks = [store.read(key) for key in list(store.keys())]
    assert [chunk.header.labels for chunk in chunks[:CHUNKS]] == [{}] * CHUNKS
    assert [chunk.header.labels for chunk in chunks[CHUNKS:]] == [{"salt": salt_tag("tenant")}] * CHUNKS
    assert b"tenant" not in b"".join(chunk.to_bytes() for chunk in chunks)
    assert {record.info.salt for record in store.records()} == {"", salt_tag("tenant")}


def test_an_unknown_model_saves_nothing():
    store = memory()
    session = connector(store, "1-2").save(IDS, None)
    assert (session.wanted, session.e_layers) == (False, set())
    put_all(session)
    assert session.finish(wait=True) == 0
    assert store.usage().chunks == 0


# Troubles


ERRORS = [TierUnavailable("down"), TierTimeout("slow"), TierFull("full"), OSError("raw"), ZeroDivisionError()]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_errors_of_the_store_never_reach_the_caller(error):
    inner = memory()
    saving = connector(FaultyTier(inner, {"write": [None, fail(error)]}))
    session = saving.save(IDS, ME)
    put_all(session)
    assert session.finish(wait=True) == CHUNKS - 1
    assert saving.counters.snapshot() == {"chunks_saved": {"": CHUNKS - 1}, "save_failures": {"": 1}}


def test_a_store_that_cannot_say_what_it_has_gets_all():
    inner = memory()
    fill(inner, ME, IDS)
    saving = connector(FaultyTier(inner, {"leading": repeat(fail(TierUnavailable("down")))}))
    assert saving.save(IDS, ME).wanted
    assert saving.counters.get("lookup_failures") == 1


class GatedTier(WrapperTier):
    """Writes wait for the gate."""

    def __init__(self, tier):
        super().__init__(tier)
        self.gate = threading.Event()

    def write(self, chunk):
        assert self.gate.wait(10)
        super().write(chunk)


def test_a_slow_store_does_not_hold_the_engine():
    store = GatedTier(memory())
    saving = connector(store)
    session = saving.save(IDS, ME)
    put_all(session)
    assert session.finish() == 0
    store.gate.set()
    saving.flush()
    assert session.finish() == CHUNKS


def test_the_backlog_is_bounded():
    store = GatedTier(memory())
    one = 2 * LAYERS * SIZE * HEADS * DIM * 4
    saving = connector(store, save_backlog=2 * one)
    session = saving.save(IDS, ME)
    put_all(session)
    store.gate.set()
    assert session.finish(wait=True) == 2
    assert saving.counters.snapshot() == {"chunks_dropped": {"": 1}, "chunks_saved": {"": 2}}
    assert_stored(store, [0, 1])
    later = saving.save(IDS, ME)
    put_all(later)
    assert later.finish(wait=True) == 1


def test_one_chunk_is_always_accepted():
    store = memory()
    saving = connector(store, save_backlog=1)
    session = saving.save(IDS[: SIZE + 1], ME)
    put_all(session, 0, SIZE)
    assert session.finish(wait=True) == 1


def test_closing_waits_for_what_is_being_saved():
    store = GatedTier(memory())
    saving = connector(store)
    session = saving.save(IDS, ME)
    put_all(session)
    threading.Timer(0.05, store.gate.set).start()
    saving.close()
    assert_stored(store, range(CHUNKS))


def test_after_closing_nothing_is_saved_and_nothing_breaks():
    store = memory()
    saving = connector(store)
    session = saving.save(IDS, ME)
    put_all(session, 0, 20)
    saving.close()
    saving.close()
    put_all(session, 20)
    assert session.finish(wait=True) == 1
    saving.flush()
    assert saving.counters.get("chunks_dropped") == CHUNKS - 1
    assert_stored(store, [0])


def test_bad_token_ids():
    with pytest.raises(UsageError):
        connector(memory()).save([-1] * 40, RECEIVER)
