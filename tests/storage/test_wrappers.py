"""The wrappers: conformance of those that change nothing, and what each one adds."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from droidspeak.errors import ChunkCorrupt, TierTimeout, TierUnavailable, UsageError
from droidspeak.storage.container import Chunk, Slot, SlotKind
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.late import LateTier
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.selection import Condition, Selection
from droidspeak.storage.testing import TierConformance, assert_holds, make_chunk, make_key
from droidspeak.storage.tier import Tier
from droidspeak.storage.wrappers import (
    FaultyTier,
    LatencyTier,
    MeteredTier,
    OperationStats,
    ReadOnlyTier,
    WrapperTier,
    corrupt,
    fail,
    hang,
    short,
)

MIB = 1 << 20


class WrapperHooks(TierConformance):
    """The conformance suite over a wrapped memory tier."""

    bounded = True
    damageable = False

    def wrap(self, tier: Tier) -> WrapperTier:
        return WrapperTier(tier)

    def make_tier(self, place: Path, capacity: int | None = None) -> Tier:
        return self.wrap(MemoryTier(capacity or MIB))

    def innermost(self, tier: Any) -> MemoryTier:
        return self.innermost(tier.tier) if isinstance(tier, WrapperTier) else tier

    def get_bytes(self, tier: Tier, key: ChunkKey) -> bytes | None:
        chunk = self.innermost(tier)._chunks.get(key)
        return chunk and chunk.to_bytes()

    def put_bytes(self, tier: Tier, key: ChunkKey, data: bytes) -> None:
        self.innermost(tier)._chunks[key] = Chunk.from_bytes(data, key)

    def drop(self, tier: Tier, key: ChunkKey) -> None:
        self.innermost(tier).delete(key)

    def cost(self, chunk: Chunk) -> int:
        return MemoryTier(MIB).footprint(chunk)


class TestWrapperTier(WrapperHooks):
    pass


class TestMeteredFaultyLatencyTier(WrapperHooks):
    def wrap(self, tier: Tier) -> WrapperTier:
        return MeteredTier(FaultyTier(LatencyTier(tier), {}))


@pytest.fixture
def inner() -> MemoryTier:
    tier = MemoryTier(MIB, name="inner")
    for seed in range(3):
        tier.write(make_chunk(seed))
    return tier


def test_takes_name_and_abilities_of_the_tier(inner: MemoryTier) -> None:
    inner.best_read = 77  # type: ignore[misc]
    wrapper = WrapperTier(inner)
    assert (wrapper.name, wrapper.in_memory, wrapper.best_read) == ("inner", True, 77)
    assert WrapperTier(inner, name="outer").name == "outer"
    assert repr(MeteredTier(wrapper)) == "<MeteredTier over <WrapperTier over <MemoryTier inner>>>"


def test_slow_and_faulty_tiers_are_no_memory(inner: MemoryTier) -> None:
    assert not LatencyTier(inner).in_memory
    assert not FaultyTier(inner, {}).in_memory
    assert ReadOnlyTier(inner).in_memory


def test_every_method_of_a_tier_is_handed_on() -> None:
    methods = {name for name in dir(Tier) if not name.startswith("_") and callable(getattr(Tier, name))}
    assert methods <= vars(WrapperTier).keys()


# Read-only


def test_read_only_reads(inner: MemoryTier) -> None:
    tier = ReadOnlyTier(inner)
    chunk = make_chunk(1)
    assert_holds(tier.read(chunk.key), chunk)
    assert tier.head(chunk.key) == inner.head(chunk.key)
    assert set(tier.keys()) == set(inner.keys())
    assert tier.usage() == inner.usage()
    assert len(tier.leading([make_key(seed) for seed in range(5)])) == 3


def test_read_only_changes_nothing(inner: MemoryTier) -> None:
    tier, key = ReadOnlyTier(inner), make_key(1)
    changes = lambda: tier.write(make_chunk(9)), lambda: tier.delete(key), lambda: tier.pin(key)
    for change in (*changes, lambda: tier.unpin(key)):
        with pytest.raises(TierUnavailable, match="inner is read-only"):
            change()
    assert inner.usage().chunks == 3


def test_read_only_evicts_nothing(inner: MemoryTier) -> None:
    assert ReadOnlyTier(inner).evict(1) == 0
    assert inner.usage().chunks == 3
    assert MeteredTier(inner).evict(1) == make_chunk(0).header.nbytes
    assert inner.usage().chunks == 2


def test_read_only_hides_what_is_corrupt(inner: MemoryTier) -> None:
    tier = ReadOnlyTier(inner)
    tier.quarantine(make_key(1))
    assert tier.head(make_key(1)) is tier.read(make_key(1)) is None
    assert set(tier.keys()) == {make_key(0), make_key(2)}
    assert len(tier.leading([make_key(seed) for seed in range(3)])) == 1
    assert inner.head(make_key(1))


# Latency


def seconds(call: Any) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


def test_each_call_takes_the_delay(inner: MemoryTier) -> None:
    tier = LatencyTier(inner, delay=0.05)
    for call in (lambda: tier.head(make_key(1)), lambda: tier.read(make_key(1)), tier.usage):
        assert 0.05 <= seconds(call) < 0.3


def test_delays_pass_at_the_same_time(inner: MemoryTier) -> None:
    tier = LatencyTier(inner, delay=0.1)
    threads = [threading.Thread(target=tier.head, args=[make_key(1)]) for _ in range(8)]

    def run() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert 0.1 <= seconds(run) < 0.4


def test_bandwidth_is_shared(inner: MemoryTier) -> None:
    chunk = make_chunk(1)
    tier = LatencyTier(inner, bandwidth=chunk.nbytes / 0.05)
    threads = [threading.Thread(target=tier.read, args=[chunk.key]) for _ in range(4)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.2 <= time.monotonic() - start < 0.6


def test_only_payload_takes_bandwidth(inner: MemoryTier) -> None:
    chunk = make_chunk(1)
    tier = LatencyTier(inner, bandwidth=chunk.nbytes / 0.2)
    assert seconds(lambda: tier.leading([chunk.key])) < 0.05
    assert seconds(lambda: tier.read(chunk.key, [])) < 0.05
    assert 0.03 <= seconds(lambda: tier.read(chunk.key, [Slot(SlotKind.K, 0)])) < 0.15
    assert seconds(lambda: tier.write(chunk)) >= 0.2


# Faults


def test_faults_come_in_the_order_of_the_plan(inner: MemoryTier) -> None:
    chunk = make_chunk(1)
    tier = FaultyTier(inner, {"read": [fail(TierTimeout("slow")), None, fail(TierUnavailable("gone"))]})
    with pytest.raises(TierTimeout, match="slow"):
        tier.read(chunk.key)
    assert_holds(tier.read(chunk.key), chunk)
    assert tier.head(chunk.key)
    with pytest.raises(TierUnavailable, match="gone"):
        tier.read(chunk.key)
    assert_holds(tier.read(chunk.key), chunk)


def test_a_fault_may_repeat(inner: MemoryTier) -> None:
    tier = FaultyTier(inner, {"write": itertools.repeat(fail(TierUnavailable("no")))})
    for _ in range(5):
        with pytest.raises(TierUnavailable):
            tier.write(make_chunk(7))
    assert inner.head(make_key(7)) is None


def test_a_hang_delays_the_answer(inner: MemoryTier) -> None:
    tier = FaultyTier(inner, {"head": [hang(0.1)]})
    assert seconds(lambda: tier.head(make_key(1))) >= 0.1
    assert seconds(lambda: tier.head(make_key(1))) < 0.1


@pytest.mark.parametrize("fault", [corrupt, short])
def test_damage_is_seen_by_who_checks_and_does_not_stay(inner: MemoryTier, fault: Any) -> None:
    chunk = make_chunk(1)
    tier = FaultyTier(inner, {"read": [fault, fault, fault]})
    for slots in (None, [Slot(SlotKind.K, 1)]):
        got = tier.read(chunk.key, slots)
        assert got is not None
        with pytest.raises(ChunkCorrupt):
            got.verify()
    assert tier.read(make_key(99)) is None
    assert_holds(tier.read(chunk.key), chunk)


def test_a_plan_names_methods(inner: MemoryTier) -> None:
    with pytest.raises(UsageError, match=r"\['load'\]; allowed: delete, evict, fold_reports, head"):
        FaultyTier(inner, {"load": [None]})


# Metering


def test_counts_calls_misses_bytes_and_errors(inner: MemoryTier) -> None:
    chunk = make_chunk(1)
    tier = MeteredTier(FaultyTier(inner, {"read": [None, None, None, fail(TierTimeout("slow"))]}))
    tier.read(chunk.key)
    tier.read(chunk.key, [Slot(SlotKind.K, 0)])
    tier.read(make_key(99))
    with pytest.raises(TierTimeout):
        tier.read(chunk.key)
    tier.write(chunk)
    tier.head(chunk.key)
    tier.head(make_key(99))
    tier.leading([chunk.key, make_key(99)])
    tier.leading([make_key(99)])
    tier.delete(make_key(99))
    tier.quarantine(chunk.key)
    counts = {
        operation: (stats.calls, stats.misses, stats.errors, stats.nbytes)
        for operation, stats in tier.snapshot().items()
    }
    assert counts == {
        "read": (4, 1, 1, chunk.nbytes + chunk.payload[Slot(SlotKind.K, 0)].numel()),
        "write": (1, 0, 0, chunk.header.nbytes),
        "head": (2, 1, 0, 0),
        "leading": (2, 1, 0, 0),
        "delete": (1, 1, 0, 0),
        "quarantine": (1, 0, 0, 0),
    }


def test_measures_seconds(inner: MemoryTier) -> None:
    tier = MeteredTier(LatencyTier(inner, delay=0.02))
    for _ in range(3):
        tier.head(make_key(1))
    assert 0.06 <= tier.snapshot()["head"].seconds < 0.5


def test_a_snapshot_does_not_change(inner: MemoryTier) -> None:
    tier = MeteredTier(inner)
    before = tier.snapshot()
    tier.usage()
    assert before == {}
    assert tier.snapshot()["usage"].calls == 1
    assert OperationStats(1, 2, 3, 4, 5.0) + OperationStats(1, 1, 1, 1, 1.0) == OperationStats(
        2, 3, 4, 5, 6.0
    )


def test_no_call_of_many_threads_is_lost(inner: MemoryTier) -> None:
    tier = MeteredTier(inner)
    threads = [
        threading.Thread(target=lambda: [tier.head(make_key(1)) for _ in range(200)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tier.snapshot()["head"].calls == 1600


# Listings


def test_a_wrapper_with_a_name_of_its_own_lists_under_it(inner: MemoryTier) -> None:
    tier = MeteredTier(inner, name="fast")
    assert {record.info.tier for record in tier.records()} == {"fast"}
    assert len(list(tier.select(Selection((Condition("tier", "=", "fast"),))))) == 3
    assert list(tier.select(Selection((Condition("tier", "=", inner.name),)))) == []
    assert tier.by_tier().keys() == {"fast"}
    assert MeteredTier(inner).by_tier().keys() == {inner.name}


def test_read_only_lists_what_it_does_not_hide(inner: MemoryTier) -> None:
    tier = ReadOnlyTier(inner)
    tier.quarantine(make_key(1))
    for found in (tier.records(), tier.select(Selection())):
        assert {record.info.key for record in found} == {make_key(0), make_key(2)}


def test_a_tier_that_is_opened_late_can_be_listed_first(inner: MemoryTier) -> None:
    for listing in (
        lambda tier: list(tier.select(Selection())),
        lambda tier: list(tier.records()),
        lambda tier: next(iter(tier.by_tier().values())).chunks * [None],
    ):
        assert len(listing(LateTier(lambda: inner, inner.name))) == 3
