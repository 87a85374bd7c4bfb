"""The layer stream: order, values, waiting, and every way in which it ends."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import pytest
import torch

from droidspeak.connector import Connector, ConnectorOptions, LayerStream, Reason
from droidspeak.connector.shards import Shard
from droidspeak.errors import (
    ChunkCorrupt,
    ChunkIncomplete,
    LoadFailed,
    TierFull,
    TierTimeout,
    TierUnavailable,
    UsageError,
)
from droidspeak.layerselect import Plan, Policy, PolicySet
from droidspeak.storage import Chunk, ChunkKey, Slot, SlotKind
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.wrappers import FaultyTier, fail, short

from .models import (
    DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    SIZE,
    WatchedTier,
    fill,
    fill_split,
    keys_of,
    memory,
    model,
    prompt,
    rows,
)

ME, SENDER = model("me"), model("sender")
IDS = prompt(5)
PLANS = ["reuse", "0-0", "0-2", "1-1", "1-3", "2-2", "0-0,2-2", "1-1,3-3", "3-3"]
E_LAYERS = [1, 2, 3]
LAYER_BYTES = 2 * SIZE * HEADS * DIM * 4


@pytest.fixture(autouse=True)
def no_threads_left():
    yield
    end = time.monotonic() + 5
    while any(thread.name.startswith("droidspeak-load") for thread in threading.enumerate()):
        assert time.monotonic() < end, "a loader is still there"
        time.sleep(0.002)


def sharing(store, plan: str = "reuse", **options) -> Connector:
    policy = Policy.fixed(SENDER.source_id, ME.source_id, Plan.parse(plan, LAYERS))
    return Connector(store, PolicySet([policy]), ConnectorOptions(chunk_size=SIZE, **options))


def opened(store, plan: str = "reuse", **options) -> LayerStream:
    """A stream over whatever the store has."""
    connector = sharing(store, plan, **options)
    match = connector.lookup(IDS, ME)
    assert match
    return connector.load(match)


def expected_kv(layer: int, plan: Plan, exact: int, shared: int) -> list[torch.Tensor]:
    mine = [rows(ME, slot, exact) for slot in Slot.kv([layer])]
    if layer not in plan.loaded:
        return mine
    theirs = [rows(SENDER, slot, exact + shared)[exact:] for slot in Slot.kv([layer])]
    return [torch.cat(pair) for pair in zip(mine, theirs, strict=True)]


# Values


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("best_read", [1, 2 * LAYER_BYTES, 1 << 20])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("exact", "shared"), [(0, 5), (2, 3), (4, 1)])
def test_values(exact, shared, plan, best_read, codec):
    store = WatchedTier(memory(), best_read)
    fill(store, ME, IDS, only=range(exact), codec=codec)
    fill(store, SENDER, IDS, E_LAYERS, codec=codec)
    plan, cut, total = Plan.parse(plan, LAYERS), exact * SIZE, (exact + shared) * SIZE
    with opened(store, str(plan), loaders=3) as stream:
        for layer in plan.transition_layers:
            assert torch.equal(stream.e(layer), rows(SENDER, Slot(SlotKind.E, layer), total)[cut:])
        for layer in range(LAYERS):
            want = expected_kv(layer, plan, cut, total - cut)
            assert all(map(torch.equal, stream.kv(layer), want))
    assert stream.bytes_loaded == read_bytes(store)


def read_bytes(store: WatchedTier) -> int:
    return sum(store.tier.read(key, slots_of(names)).nbytes for key, names in store.reads)


def slots_of(names: list[str]) -> list[Slot]:
    return [Slot.parse(name) for name in names]


def test_exact_chunks_alone():
    store = memory()
    fill(store, ME, IDS)
    with opened(store) as stream:
        for layer in range(LAYERS):
            want = [rows(ME, slot, 5 * SIZE) for slot in Slot.kv([layer])]
            assert all(map(torch.equal, stream.kv(layer), want))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_from_disk(tmp_path, dtype):
    me = model("me", dtype=dtype)
    with DiskTier(tmp_path, min_free=0) as store:
        fill(store, me, IDS)
        connector = Connector(store, options=ConnectorOptions(chunk_size=SIZE))
        with connector.load(connector.lookup(IDS, me)) as stream:
            for layer in range(LAYERS):
                want = [rows(me, slot, 5 * SIZE) for slot in Slot.kv([layer])]
                assert all(map(torch.equal, stream.kv(layer), want))


def test_a_shard_holds_its_heads_alone():
    me, half = model("me"), model("me", kv_heads=HEADS // 2)
    store = memory()
    keys = [type(key)(me.source_id, "1of2", key.prefix) for key in keys_of(me, IDS)]
    for index, key in enumerate(keys):
        tensors = {slot: rows(half, slot, 5 * SIZE)[index * SIZE :][:SIZE] for slot in Slot.kv(range(LAYERS))}
        store.write(Chunk.encode(key, tensors))
    connector = Connector(store, options=ConnectorOptions(chunk_size=SIZE, shard="1of2"))
    with connector.load(connector.lookup(IDS, me)) as stream:
        k, _ = stream.kv(1)
        assert torch.equal(k, rows(half, Slot(SlotKind.K, 1), 5 * SIZE))


def test_one_rank_looks_up_for_all():
    store = memory()
    for rank in range(2):
        shard = f"{rank}of2"
        for key in keys_of(ME, IDS):
            tensors = {
                slot: torch.full((SIZE, HEADS // 2, DIM), float(rank)) for slot in Slot.kv(range(LAYERS))
            }
            store.write(Chunk.encode(ChunkKey(key.source, shard, key.prefix), tensors))
    first, second = (sharing(store, shard=f"{rank}of2") for rank in range(2))
    match = first.lookup(IDS, ME)
    for rank, connector in enumerate((first, second)):
        with connector.load(match) as stream:
            assert all(bool((rows == rank).all()) for layer in range(LAYERS) for rows in stream.kv(layer))


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(("saved", "loading"), [(1, 2), (2, 1), (2, 4), (4, 2), (4, 1)])
def test_any_degree_serves_any_other(saved, loading, heads):
    me, sender = model("me", kv_heads=heads), model("sender", kv_heads=heads)
    policies = PolicySet([Policy.fixed(sender.source_id, me.source_id, Plan.parse("1-2", LAYERS))])
    store = memory()
    fill_split(store, sender, IDS, saved, [1])
    fill_split(store, me, IDS[: 2 * SIZE], saved)
    for rank in range(loading):
        shard = Shard(rank, loading)
        options = ConnectorOptions(chunk_size=SIZE, shard=str(shard), degrees=(saved,))
        connector = Connector(store, policies, options)
        match = connector.lookup(IDS, me)
        assert (match.exact_tokens, match.shared_tokens) == (2 * SIZE, 3 * SIZE)
        mine = slice(shard.heads(heads).start, shard.heads(heads).stop)
        with connector.load(match) as stream:
            assert torch.equal(stream.e(1), rows(sender, Slot(SlotKind.E, 1), 5 * SIZE)[2 * SIZE :])
            for layer in range(LAYERS):
                for got, slot in zip(stream.kv(layer), Slot.kv([layer]), strict=True):
                    own = rows(me, slot, 2 * SIZE)[:, mine]
                    shared = rows(sender, slot, 5 * SIZE)[2 * SIZE :, mine]
                    assert torch.equal(got, own if layer in (1, 2) else torch.cat([own, shared]))


def test_a_chunk_of_another_degree_with_heads_of_none_is_corrupt():
    store = memory()
    fill_split(store, ME, IDS, 1)
    key = keys_of(ME, IDS)[1]
    tensors = {slot: torch.zeros(SIZE, HEADS + 1, DIM) for slot in Slot.kv(range(LAYERS))}
    store.write(Chunk.encode(key, tensors))
    connector = Connector(store, options=ConnectorOptions(chunk_size=SIZE, shard="1of2"))
    with (
        connector.load(connector.lookup(IDS, ME)) as stream,
        pytest.raises(LoadFailed) as caught,
    ):
        stream.kv(LAYERS - 1)
    assert caught.value.reason == Reason.CORRUPT


def test_what_is_loaded_is_the_requests_own():
    store = memory()
    fill(store, ME, IDS)
    with opened(store) as first:
        for layer in range(LAYERS):
            first.kv(layer)[0].fill_(7)
    with opened(store) as second:
        assert torch.equal(second.kv(0)[0], rows(ME, Slot(SlotKind.K, 0), 5 * SIZE))


# Order


def order(plan: str, best_read: int = 1, exact: int = 2) -> list[tuple[str, int, list[str]]]:
    """Whose chunk of which number, and which slots, in the order in which they were read."""
    store = WatchedTier(memory(), best_read)
    owners = {}
    for name, source, only in (("me", ME, range(exact)), ("sender", SENDER, range(3))):
        keys = fill(store, source, IDS, E_LAYERS, only=only)
        owners |= {key: (name, index) for index, key in enumerate(keys)}
    with opened(store, plan, loaders=1) as stream:
        for layer in stream._plan.loaded:
            stream.kv(layer)
    return [(*owners[key], names) for key, names in store.reads]


def test_order_of_reads():
    assert order("2-2") == [
        ("sender", 2, ["e.2"]),
        *[("me", n, ["k.2", "v.2"]) for n in (0, 1)],
        *[
            (name, n, [f"k.{layer}", f"v.{layer}"])
            for layer in (0, 1, 3)
            for name, n in (("me", 0), ("me", 1), ("sender", 2))
        ],
    ]


def test_every_transition_layer_comes_before_everything_else():
    assert order("1-1,3-3", exact=0)[:6] == [
        *[("sender", n, ["e.1"]) for n in range(3)],
        *[("sender", n, ["e.3"]) for n in range(3)],
    ]


def test_recomputed_layers_of_the_sender_are_not_read():
    names = {name for _, _, slots in order("0-2", exact=0) for name in slots}
    assert names == {"k.3", "v.3"}


def test_layers_are_read_together_up_to_one_good_request():
    reads = order("reuse", best_read=3 * LAYER_BYTES, exact=0)
    assert [slots for _, n, slots in reads if n == 0] == [
        ["k.0", "v.0", "k.1", "v.1", "k.2", "v.2"],
        ["k.3", "v.3"],
    ]


def test_nothing_is_read_twice():
    reads = [(owner, n, name) for owner, n, names in order("1-2", best_read=1 << 20) for name in names]
    assert len(reads) == len(set(reads))


# Waiting


def test_a_layer_can_be_had_while_later_ones_are_blocked():
    store = WatchedTier(memory())
    fill(store, SENDER, IDS, E_LAYERS)
    gates = {slot: threading.Event() for slot in (Slot(SlotKind.E, 2), *Slot.kv(range(LAYERS)))}
    store.before = lambda key, slots: gates[slots[0]].wait(10)
    with opened(store, "2-2", loaders=2) as stream:
        gates[Slot(SlotKind.E, 2)].set()
        stream.e(2)
        for layer in (0, 1, 3):
            done = threading.Event()
            waiting = threading.Thread(target=lambda layer=layer, done=done: (stream.kv(layer), done.set()))
            waiting.start()
            assert not done.wait(0.02)
            gates[Slot(SlotKind.K, layer)].set()
            assert done.wait(5)
            waiting.join()
    assert stream.wait_seconds >= 0.05


def test_whether_a_layer_can_be_had_without_waiting():
    gate = threading.Event()

    def before(_key, slots):
        if Slot(SlotKind.K, 3) in slots:
            gate.wait(10)

    store = WatchedTier(memory(), before=before)
    fill(store, SENDER, IDS, E_LAYERS)
    with opened(store, "1-1", loaders=1) as stream:
        assert stream.ready([0, 2], [1], timeout=5)
        assert not stream.ready([3])
        assert not stream.ready([0, 3], timeout=0.001)
        gate.set()
        assert stream.ready([3], timeout=5)
        assert stream.ready([])


def test_what_has_failed_or_is_late_need_not_be_waited_for():
    gate = threading.Event()
    store = WatchedTier(memory(), before=lambda *_: gate.wait(10))
    fill(store, SENDER, IDS)
    with opened(store, load_deadline=0.05) as stream:
        assert stream.ready([0], timeout=5)
        with pytest.raises(LoadFailed, match="deadline"):
            stream.kv(0)
        assert stream.ready([3])
        gate.set()


def test_several_loaders_read_at_the_same_time():
    store = WatchedTier(memory())
    fill(store, ME, IDS)
    together = threading.Barrier(3)
    store.before = lambda key, slots: together.wait(5) if slots[0] == Slot(SlotKind.K, 0) else None
    short_ids = IDS[: 3 * SIZE + 1]
    connector = Connector(store, options=ConnectorOptions(chunk_size=SIZE, loaders=3))
    with connector.load(connector.lookup(short_ids, ME)) as stream:
        stream.kv(0)


def test_wait_seconds_is_what_the_engine_waited():
    store = memory()
    fill(store, ME, IDS)
    with opened(store) as stream:
        stream.kv(LAYERS - 1)
        before = stream.wait_seconds
        for layer in range(LAYERS):
            stream.kv(layer)
    assert stream.wait_seconds - before < 0.05


# The ends


def ask_until(stream: LayerStream, layer: int, end: float) -> None:
    """Asks again and again: an early layer may have come before the stream failed."""
    while time.monotonic() < end:
        stream.kv(layer)


def end_of(stream: LayerStream) -> LoadFailed:
    """How a stream ends that must fail, at each of its awaits, and quickly."""
    started = time.monotonic()
    with stream:
        reasons = []
        for layer in range(LAYERS):
            with pytest.raises(LoadFailed) as caught:
                ask_until(stream, layer, started + 5)
            reasons.append(caught.value.reason)
    assert len(set(reasons)) == 1
    return caught.value


@pytest.mark.parametrize("victim", range(5))
def test_a_chunk_that_went_missing(victim):
    store = memory()
    keys = fill(store, ME, IDS)
    connector = sharing(store)
    match = connector.lookup(IDS, ME)
    store.delete(keys[victim])
    assert end_of(connector.load(match)).reason is Reason.EVICTED


def test_a_chunk_that_was_replaced_by_one_without_e():
    store = memory()
    fill(store, SENDER, IDS, E_LAYERS)
    connector = sharing(store, "2-2")
    match = connector.lookup(IDS, ME)
    fill(store, SENDER, IDS, only=[3])
    assert end_of(connector.load(match)).reason is Reason.EVICTED


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ChunkCorrupt("x"), Reason.CORRUPT),
        (ChunkIncomplete("x"), Reason.EVICTED),
        (TierTimeout("x"), Reason.TIMEOUT),
        (TierUnavailable("x"), Reason.STORE_UNAVAILABLE),
        (TierFull("x"), Reason.STORE_UNAVAILABLE),
    ],
)
@pytest.mark.parametrize("call", [0, 3])
def test_errors_of_the_store(error, reason, call):
    inner = memory()
    fill(inner, ME, IDS)
    store = FaultyTier(inner, {"read": [*repeat(None, call), fail(error)]})
    failed = end_of(opened(store))
    assert (failed.reason, str(failed)) == (reason, "x")


def test_a_corrupt_chunk_is_quarantined_before_the_engine_hears_of_it():
    inner = memory()
    keys = fill(inner, ME, IDS)
    store = WatchedTier(inner)

    def damaged(key, slots):
        if key == keys[2]:
            raise ChunkCorrupt("flipped")

    store.before = damaged
    with opened(store, loaders=1) as stream, pytest.raises(LoadFailed):
        stream.kv(3)
    assert store.quarantined == [keys[2]]
    assert sharing(inner).lookup(IDS, ME).tokens == 2 * SIZE


def test_a_chunk_that_is_gone_because_another_loader_found_it_corrupt():
    """Two loaders on one chunk: whichever speaks first, the reason is the first cause."""
    inner = memory()
    keys = fill(inner, ME, IDS[: SIZE + 1])
    store = WatchedTier(inner)
    gone = threading.Event()

    def damaged(key, slots):
        if slots[0].layer == 0:
            inner.delete(key)
            gone.set()
            time.sleep(0.05)
            raise ChunkCorrupt("flipped")
        assert gone.wait(5)

    store.before = damaged
    with opened(store, loaders=4) as stream, pytest.raises(LoadFailed) as caught:
        stream.kv(2)
    assert caught.value.reason is Reason.CORRUPT
    assert store.quarantined == keys


@pytest.mark.parametrize("first", [0, 1])
def test_every_corrupt_chunk_under_way_is_quarantined_before_the_engine_hears_of_it(first):
    """What the engine saves next must not meet a quarantine that comes late."""
    inner = memory()
    keys = fill(inner, ME, IDS[: 2 * SIZE + 1])
    store = WatchedTier(inner)
    reading = threading.Barrier(2)

    def damaged(key, slots):
        reading.wait(5)
        time.sleep(0 if key == keys[first] else 0.05)
        raise ChunkCorrupt("flipped")

    store.before = damaged
    with opened(store, loaders=2) as stream, pytest.raises(LoadFailed):
        stream.kv(0)
    assert sorted(store.quarantined) == sorted(keys)
    assert inner.usage().chunks == 0


def test_a_bad_chunk_does_not_wait_for_a_store_that_hangs():
    store = WatchedTier(memory())
    keys = fill(store, ME, IDS[: 2 * SIZE + 1])
    gate = threading.Event()

    def damaged(key, slots):
        if key == keys[0]:
            raise ChunkCorrupt("flipped")
        gate.wait(10)

    store.before = damaged
    started = time.monotonic()
    with opened(store, loaders=2, load_deadline=0.1) as stream, pytest.raises(LoadFailed):
        stream.kv(0)
    gate.set()
    assert time.monotonic() - started < 2


def test_a_quarantine_that_fails_is_no_worse():
    inner = memory()
    fill(inner, ME, IDS)
    store = FaultyTier(
        inner, {"read": repeat(fail(ChunkCorrupt("x"))), "quarantine": repeat(fail(TierUnavailable("y")))}
    )
    assert end_of(opened(store)).reason is Reason.CORRUPT


def test_a_slot_that_is_too_short():
    inner = memory()
    fill(inner, ME, IDS)
    assert end_of(opened(FaultyTier(inner, {"read": [None, short]}))).reason is Reason.CORRUPT


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.to(torch.float16),
        lambda t: t.to(torch.float64),
        lambda t: t[..., :-1].contiguous(),
        lambda t: t.transpose(1, 2).contiguous() if t.ndim == 3 else t,
        lambda t: t.reshape(t.shape[0] // 2, 2 * t.shape[1], -1),
    ],
)
@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_sound_chunks_of_another_shape_or_dtype_are_never_used(spoil, codec):
    store = memory()
    keys = fill(store, SENDER, IDS)
    tensors = {slot: rows(SENDER, slot, SIZE) for slot in Slot.kv(range(LAYERS))}
    spoiled = {slot: spoil(tensor) for slot, tensor in tensors.items()}
    store.write(Chunk.encode(keys[0], spoiled, codec=codec))
    watched = WatchedTier(store)
    assert end_of(opened(watched)).reason is Reason.CORRUPT
    assert watched.quarantined == [], "it may be sound for those whose it is"


def test_e_of_another_width_is_never_used():
    store = memory()
    keys = fill(store, SENDER, IDS, [2])
    tensors = {slot: rows(SENDER, slot, SIZE) for slot in Slot.kv(range(LAYERS))}
    store.write(Chunk.encode(keys[1], tensors | {Slot(SlotKind.E, 2): torch.zeros(SIZE, HIDDEN + 1)}))
    with opened(store, "2-3") as stream, pytest.raises(LoadFailed, match=r"e\.2"):
        stream.e(2)


@pytest.mark.parametrize("deadline", [0.05, 0.2])
def test_deadline(deadline):
    store = WatchedTier(memory())
    fill(store, ME, IDS)
    gate = threading.Event()
    store.before = lambda key, slots: gate.wait(10)
    started = time.monotonic()
    with opened(store, load_deadline=deadline) as stream:
        with pytest.raises(LoadFailed) as caught:
            stream.kv(0)
        assert caught.value.reason is Reason.TIMEOUT
        assert deadline <= time.monotonic() - started < deadline + 2
        with pytest.raises(LoadFailed):
            stream.kv(1)
        gate.set()
        time.sleep(0.02)
        with pytest.raises(LoadFailed):
            stream.kv(0)


def test_what_has_come_can_be_had_after_the_deadline():
    store = memory()
    fill(store, ME, IDS)
    with opened(store, load_deadline=0.3) as stream:
        for layer in range(LAYERS):
            stream.kv(layer)
        time.sleep(0.31)
        stream.kv(LAYERS - 1)


def test_an_unexpected_error_reaches_whoever_waits():
    store = WatchedTier(memory())
    fill(store, ME, IDS)

    def bug(key, slots):
        raise ZeroDivisionError("a bug in a tier")

    store.before = bug
    with opened(store) as stream:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="a bug"):
                stream.kv(0)


def test_closing_early_stops_reading():
    store = WatchedTier(memory())
    fill(store, ME, IDS)
    entered, gate = threading.Event(), threading.Event()
    store.before = lambda key, slots: (entered.set(), gate.wait(10))
    with opened(store, loaders=1) as stream:
        entered.wait(5)
    gate.set()
    started = time.monotonic()
    with pytest.raises(UsageError, match="closed"):
        stream.kv(1)
    assert time.monotonic() - started < 1
    time.sleep(0.02)
    assert len(store.reads) == 1


def test_closing_wakes_whoever_waits():
    store = WatchedTier(memory())
    fill(store, ME, IDS)
    gate = threading.Event()
    store.before = lambda key, slots: gate.wait(10)
    stream = opened(store)
    woken: list[BaseException] = []

    def wait() -> None:
        with pytest.raises(UsageError, match="closed") as caught:
            stream.kv(0)
        woken.append(caught.value)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.02)
    stream.close()
    thread.join(5)
    gate.set()
    assert woken


def test_what_has_come_can_be_had_after_closing():
    store = memory()
    fill(store, ME, IDS)
    with opened(store) as stream:
        stream.kv(LAYERS - 1)
        stream.kv(0)
    assert torch.equal(stream.kv(0)[0], rows(ME, Slot(SlotKind.K, 0), 5 * SIZE))


def test_closing_twice():
    store = memory()
    fill(store, ME, IDS)
    stream = opened(store)
    stream.close()
    stream.close()


def test_misuse_is_one_line():
    store = memory()
    fill(store, SENDER, IDS, E_LAYERS)
    connector = sharing(store, "2-3")
    with connector.load(connector.lookup(IDS, ME)) as stream:
        for wrong in (lambda: stream.e(1), lambda: stream.kv(LAYERS), lambda: stream.kv(-1)):
            with pytest.raises(UsageError) as caught:
                wrong()
            assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="without chunks"):
        connector.load(connector.lookup(prompt(2, seed=9), ME))


def test_many_streams_at_once():
    store = memory()
    fill(store, ME, IDS, only=[0, 1])
    fill(store, SENDER, IDS, E_LAYERS)

    def load(_: int) -> bool:
        with opened(store, "1-2", loaders=2) as stream:
            e, (k, _) = stream.e(1), stream.kv(3)
        want = expected_kv(3, Plan.parse("1-2", LAYERS), 2 * SIZE, 3 * SIZE)[0]
        return torch.equal(e, rows(SENDER, Slot(SlotKind.E, 1), 5 * SIZE)[2 * SIZE :]) and torch.equal(
            k, want
        )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(load, range(40)))
