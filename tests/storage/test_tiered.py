"""The tiered store: where chunks are found, what is copied where, and what happens when tiers fail."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from droidspeak.errors import (
    ChunkCorrupt,
    ChunkIncomplete,
    ConfigError,
    TierFull,
    TierTimeout,
    TierUnavailable,
    UsageError,
)
from droidspeak.storage.container import Chunk, Slot, SlotKind
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.guard import Limits
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.testing import TierConformance, assert_holds, make_chunk, make_key
from droidspeak.storage.tier import ChunkInfo, Tier
from droidspeak.storage.tiered import TieredStore, WriteBackOptions
from droidspeak.storage.wrappers import FaultyTier, LatencyTier, MeteredTier, ReadOnlyTier, fail, hang

from .gates import QUICK, GatedTier, eventually

MIB = 1 << 20
BOUND = 5.0
"""Seconds that "a bounded delay" may take on a busy machine; the deadlines are far shorter."""
FAST_END = WriteBackOptions(put_timeout=0.2, close_timeout=0.5)
SIZE = make_chunk(0).header.nbytes
SOME = Slot.kv([0])


@pytest.fixture
def memory() -> MemoryTier:
    return MemoryTier(MIB)


@pytest.fixture
def disk(tmp_path: Path) -> DiskTier:
    return DiskTier(tmp_path / "disk", min_free=0)


@pytest.fixture
def opened() -> Iterator[Callable[..., TieredStore]]:
    """Opens stores that are closed after the test, when all gates have been opened."""
    stores: list[TieredStore] = []

    def open_store(*tiers: Tier, **options: Any) -> TieredStore:
        stores.append(TieredStore(tiers, **options))
        return stores[-1]

    yield open_store
    for store in stores:
        for tier in store.tiers:
            inner: Any = tier
            while inner := getattr(inner, "tier", None):
                if isinstance(inner, GatedTier):
                    inner.gate.set()
        store.close()


def forgets(store: TieredStore, key: ChunkKey) -> None:
    """The first tier evicts `key`."""
    assert store.tiers[0].delete(key)


# Conformance: a store is a tier


class _WritesThrough(TieredStore):
    """What is written is in all tiers on return, so that it can be looked at."""

    def write(self, chunk: Chunk) -> None:
        super().write(chunk)
        assert self.flush(10)


class StoreHooks(TierConformance):
    """Memory and disk together: see `test_tiered_state`."""

    persistent = True
    operations = 20

    def disk(self, store: Any) -> DiskTier:
        tier = store.tiers[-1].tier
        assert isinstance(tier, DiskTier)
        return tier

    def get_bytes(self, tier: Tier, key: ChunkKey) -> bytes | None:
        path = self.disk(tier).path(key)
        return path.read_bytes() if path.exists() else None

    def put_bytes(self, tier: Tier, key: ChunkKey, data: bytes) -> None:
        self.disk(tier).path(key).write_bytes(data)

    def drop(self, tier: Tier, key: ChunkKey) -> None:
        self.disk(tier).path(key).unlink()

    def settle(self, tier: Tier) -> None:
        assert isinstance(tier, TieredStore)
        assert tier.flush()


class TestDiskAlone(StoreHooks):
    reads_ranges = True

    def make_tier(self, place: Path, capacity: int | None = None) -> TieredStore:
        return _WritesThrough([DiskTier(place, min_free=0)])


class TestMemoryTooSmallForAnything(StoreHooks):
    """Every write is refused by the one tier and taken by the other."""

    def make_tier(self, place: Path, capacity: int | None = None) -> TieredStore:
        return _WritesThrough([MemoryTier(64), DiskTier(place, min_free=0)])


# What a store is made of


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_tiers_need_different_names(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="different names"):
        TieredStore([MemoryTier(MIB, name=name) for name in names])


def test_limits_are_of_tiers_that_are_there(memory: MemoryTier) -> None:
    with pytest.raises(ConfigError, match=r"'dsik'.*cpu"):
        TieredStore([memory], limits={"dsik": Limits()})


# Finding


def test_a_run_goes_on_where_another_tier_ends(
    opened: Callable[..., TieredStore], memory: MemoryTier, disk: DiskTier
) -> None:
    chunks = [make_chunk(n) for n in range(10)]
    for n, chunk in enumerate(chunks):
        (memory if n in (0, 1, 4, 7, 9) else disk).write(chunk)
    store = opened(memory, disk)
    keys = [chunk.key for chunk in chunks]
    assert store.leading(keys) == [ChunkInfo.of(chunk) for chunk in chunks]
    disk.delete(keys[6])
    assert store.leading(keys) == [ChunkInfo.of(chunk) for chunk in chunks[:6]]
    assert store.head(keys[6]) is None
    assert store.head(keys[7]) == ChunkInfo.of(chunks[7])


def test_no_tier_is_asked_twice_about_a_gap(opened: Callable[..., TieredStore], memory: MemoryTier) -> None:
    slow = MeteredTier(LatencyTier(MemoryTier(MIB, name="slow")))
    store = opened(memory, slow)
    memory.write(make_chunk(0))
    slow.write(make_chunk(1))
    assert len(store.leading([make_key(n) for n in range(5)])) == 2
    assert slow.snapshot()["leading"].calls == 1
    assert store.leading([make_key(9)]) == []
    assert slow.snapshot()["leading"].calls == 2


def test_a_run_goes_through_what_waits_to_be_written(opened: Callable[..., TieredStore]) -> None:
    slow = GatedTier(MemoryTier(MIB, name="slow"), "write")
    old, new = make_chunk(1), make_chunk(11, key=make_key(1), e_layers=(0, 1))
    for chunk in (make_chunk(0), old, make_chunk(2)):
        slow.tier.write(chunk)
    store = opened(slow)
    store.write(new)
    store.write(make_chunk(3))
    run = store.leading([make_key(n) for n in range(5)])
    assert run == [ChunkInfo.of(c) for c in (make_chunk(0), new, make_chunk(2), make_chunk(3))]
    assert set(store.keys()) == {make_key(n) for n in range(4)}


def test_a_lookup_needs_one_tier_that_answers(opened: Callable[..., TieredStore], memory: MemoryTier) -> None:
    dead = itertools.repeat(fail(TierUnavailable("dead")))
    memory.write(make_chunk(0))
    slow = FaultyTier(MemoryTier(MIB, name="slow"), {"leading": dead})
    assert opened(memory, slow).leading([make_key(0), make_key(1)]) == [ChunkInfo.of(make_chunk(0))]
    with pytest.raises(TierUnavailable, match="no tier"):
        opened(slow).leading([make_key(0)])


# Reading and promotion


def test_reads_from_the_fastest_tier_that_has_it(
    opened: Callable[..., TieredStore], memory: MemoryTier, disk: DiskTier
) -> None:
    store = opened(memory, disk, promote=False)
    memory.write(make_chunk(0))
    disk.write(make_chunk(1))
    assert_holds(store.read(make_key(0)), make_chunk(0))
    assert_holds(store.read(make_key(1), SOME), make_chunk(1), SOME)
    assert store.read(make_key(2)) is None
    assert store.flush()
    assert store.counters.snapshot() == {"hits": {"cpu": 1, "disk": 1}, "misses": {"": 1}}


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("how", ["whole", "part", "into"])
def test_what_a_slower_tier_gave_comes_from_memory_next_time(
    opened: Callable[..., TieredStore], memory: MemoryTier, disk: DiskTier, codec: str, how: str
) -> None:
    chunk = make_chunk(1, codec=codec)
    disk.write(chunk)
    store = opened(memory, disk)
    into = {slot: torch.zeros_like(chunk.tensor(slot)) for slot in chunk.payload} if how == "into" else None
    got = store.read(chunk.key, SOME if how == "part" else None, into)
    assert_holds(got, chunk, SOME if how == "part" else None)
    assert store.flush()
    for tensor in (into or {}).values():
        tensor.view(torch.uint8).fill_(7)
    assert_holds(memory.read(chunk.key), chunk)
    assert_holds(store.read(chunk.key), chunk)
    assert store.counters.get("hits", "cpu") == store.counters.get("promotions", "cpu") == 1


def test_without_promotion_nothing_is_copied(
    opened: Callable[..., TieredStore], memory: MemoryTier, disk: DiskTier
) -> None:
    disk.write(make_chunk(1))
    store = opened(memory, disk, promote=False)
    store.read(make_key(1))
    assert store.flush()
    assert list(memory.keys()) == []


def test_a_chunk_with_less_does_not_hide_one_with_more(
    opened: Callable[..., TieredStore], memory: MemoryTier, disk: DiskTier
) -> None:
    less, more = make_chunk(1, e_layers=()), make_chunk(2, key=make_key(1), e_layers=(0, 1))
    memory.write(less)
    disk.write(more)
    store = opened(memory, disk)
    e = [Slot(SlotKind.E, 0)]
    assert_holds(store.read(make_key(1), e), more, e)
    assert store.flush()
    assert_holds(memory.read(make_key(1)), more)
    with pytest.raises(ChunkIncomplete):
        store.read(make_key(1), [Slot(SlotKind.E, 7)])


# Single flight


def read_together(
    store: TieredStore, slow: GatedTier, count: int, chunk: Chunk
) -> tuple[list[Chunk], dict[Slot, torch.Tensor]]:
    """`count` readers of one chunk, all there before the read of the first one is answered."""
    into = {slot: torch.zeros_like(chunk.tensor(slot)) for slot in chunk.payload}
    with ThreadPoolExecutor(count) as pool:
        calls = [pool.submit(store.read, chunk.key, None, into)]
        assert slow.entered.wait(10)
        calls += [pool.submit(store.read, chunk.key) for _ in range(count - 1)]
        flights = store._levels[-1]._flights._flights
        assert eventually(lambda: sum(flight.joined for flight in flights.values()) == count - 1)
        slow.gate.set()
        return [call.result(10) for call in calls], into


def test_many_readers_of_a_slow_tier_make_one_read(
    opened: Callable[..., TieredStore], disk: DiskTier
) -> None:
    chunk = make_chunk(1)
    disk.write(chunk)
    slow = GatedTier(disk, "read")
    store = opened(slow)
    got, into = read_together(store, slow, 8, chunk)
    assert slow.calls.count("read") == 1
    assert store.counters.snapshot() == {"hits": {"disk": 8}, "shared_reads": {"disk": 7}}
    for each in got:
        assert_holds(each, chunk)
    # The first reader owns its memory and may change it.
    for tensor in into.values():
        tensor.view(torch.uint8).fill_(7)
    assert all(not torch.equal(got[0].payload[slot], chunk.payload[slot]) for slot in chunk.payload)
    for each in got[1:]:
        assert_holds(each, chunk)


def test_who_reads_after_a_write_does_not_join_a_read_from_before(
    opened: Callable[..., TieredStore],
) -> None:
    old, new = make_chunk(1), make_chunk(2, key=make_key(1))

    class Lagging(GatedTier):
        """Answers with what was there when it was asked."""

        def read(self, *args: Any, **options: Any) -> Chunk | None:
            answer = self.tier.read(*args, **options)
            super().read(*args, **options)
            return answer

    slow = Lagging(MemoryTier(MIB, name="slow"), "read")
    slow.tier.write(old)
    store = opened(slow)
    with ThreadPoolExecutor(2) as pool:
        before = pool.submit(store.read, old.key)
        assert slow.entered.wait(10)
        store.write(new)
        assert store.flush()
        after = pool.submit(store.read, old.key)
        assert eventually(lambda: slow.calls.count("read") == 2)
        slow.gate.set()
        assert_holds(before.result(10), old)
        assert_holds(after.result(10), new)


# Writing


def test_reads_what_a_slow_tier_has_not_written_yet(opened: Callable[..., TieredStore]) -> None:
    slow = GatedTier(MemoryTier(MIB, name="slow"), "write")
    store = opened(slow)
    chunk = make_chunk(1)
    store.write(chunk)
    assert slow.entered.wait(10)
    assert_holds(store.read(chunk.key), chunk)
    assert_holds(store.read(chunk.key, SOME), chunk, SOME)
    with pytest.raises(ChunkIncomplete):
        store.read(chunk.key, [Slot(SlotKind.E, 7)])
    newer = make_chunk(2, key=chunk.key)
    store.write(newer)
    assert_holds(store.read(chunk.key), newer)
    assert not store.flush(0.05)
    slow.gate.set()
    assert store.flush(10)
    assert_holds(slow.tier.read(chunk.key), newer)


def test_a_part_of_a_chunk_is_written_nowhere(opened: Callable[..., TieredStore], memory: MemoryTier) -> None:
    slow = LatencyTier(MemoryTier(MIB, name="slow"))
    store = opened(memory, slow)
    chunk = make_chunk(1)
    with pytest.raises(ChunkIncomplete):
        store.write(Chunk(chunk.header, {SOME[0]: chunk.payload[SOME[0]]}))
    assert store.flush(10)
    assert list(store.keys()) == []


def test_the_queue_is_bounded_then_writes_are_dropped(
    opened: Callable[..., TieredStore], memory: MemoryTier
) -> None:
    slow = GatedTier(MemoryTier(MIB, name="slow"), "write")
    nbytes = make_chunk(0).nbytes
    options = WriteBackOptions(capacity=2 * nbytes, put_timeout=0.1)
    store = opened(memory, slow, write_back=options)
    start = time.monotonic()
    for n in range(4):
        store.write(make_chunk(n))
    assert 0.2 <= time.monotonic() - start < BOUND
    assert store.counters.snapshot() == {"writes_dropped": {"slow": 2}}
    assert [store.head(make_key(n)) is not None for n in range(4)] == [True] * 4, "memory has them"
    slow.gate.set()
    assert store.flush(10)
    assert set(slow.tier.keys()) == {make_key(0), make_key(1)}


def test_a_write_that_no_tier_takes_is_refused(opened: Callable[..., TieredStore]) -> None:
    store = opened(
        GatedTier(MemoryTier(MIB), "write"), write_back=WriteBackOptions(capacity=1, put_timeout=0.05)
    )
    store.write(make_chunk(0))
    with pytest.raises(TierUnavailable, match="write queue"):
        store.write(make_chunk(1))


def test_a_write_waits_for_room(opened: Callable[..., TieredStore]) -> None:
    slow = GatedTier(MemoryTier(MIB, name="slow"), "write")
    store = opened(slow, write_back=WriteBackOptions(capacity=1, put_timeout=30))
    store.write(make_chunk(0))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.write, make_chunk(1))
        time.sleep(0.05)
        assert not waiting.done()
        slow.gate.set()
        waiting.result(10)
    assert store.flush(10)
    assert store.counters.snapshot() == {}
    assert slow.tier.usage().chunks == 2


@pytest.mark.parametrize("medium", ["full", "read-only"])
def test_a_disk_that_cannot_be_written_is_still_read(
    opened: Callable[..., TieredStore], tmp_path: Path, caplog: pytest.LogCaptureFixture, medium: str
) -> None:
    with DiskTier(tmp_path / "disk", min_free=0) as before:
        before.write(make_chunk(0))
    if medium == "full":
        disk = DiskTier(tmp_path / "disk", min_free=1 << 60)
    else:
        disk = DiskTier(tmp_path / "disk", read_only=True)
    store = opened(MemoryTier(MIB), disk, promote=False)
    for n in range(1, 6):
        store.write(make_chunk(n))
    assert store.flush(10)
    assert store.counters.snapshot() == {"write_failures": {"disk": 5}}
    assert [record.levelno for record in caplog.records] == [logging.WARNING], "told once per outage"
    assert_holds(store.read(make_key(0)), make_chunk(0))
    assert_holds(store.read(make_key(5)), make_chunk(5))


def test_an_older_chunk_does_not_outlive_a_newer_one_without_room(
    opened: Callable[..., TieredStore], disk: DiskTier
) -> None:
    memory = MemoryTier(SIZE)
    store = opened(memory, disk)
    old, new = make_chunk(1), make_chunk(2, key=make_key(1), tokens=64)
    store.write(old)
    store.write(new)
    assert_holds(store.read(old.key), new)
    assert store.flush(10)
    assert_holds(store.read(old.key), new)
    assert_holds(disk.read(old.key), new)


def test_nor_where_it_was_to_be_written_later(opened: Callable[..., TieredStore], disk: DiskTier) -> None:
    old, new = make_chunk(1), make_chunk(2, key=make_key(1))
    disk.write(old)
    memory = MemoryTier(MIB)
    store = opened(memory, FaultyTier(disk, {"write": [fail(TierFull("no room"))]}), promote=False)
    store.write(new)
    assert store.flush(10)
    assert_holds(store.read(old.key), new)
    memory.delete(old.key)
    assert store.read(old.key) is None


def test_a_refused_write_loses_nothing(opened: Callable[..., TieredStore]) -> None:
    store = opened(MemoryTier(SIZE))
    store.write(make_chunk(1))
    with pytest.raises(TierFull):
        store.write(make_chunk(2, key=make_key(1), tokens=64))
    assert_holds(store.read(make_key(1)), make_chunk(1))


# Damage


def damage(disk: DiskTier, key: ChunkKey) -> None:
    data = bytearray(disk.path(key).read_bytes())
    data[-1] ^= 1
    disk.path(key).write_bytes(data)


def test_a_corrupt_chunk_is_quarantined_and_a_good_copy_served(
    opened: Callable[..., TieredStore], tmp_path: Path, disk: DiskTier, caplog: pytest.LogCaptureFixture
) -> None:
    backup = DiskTier(tmp_path / "backup", min_free=0, name="backup")
    chunk = make_chunk(1)
    disk.write(chunk)
    backup.write(chunk)
    damage(disk, chunk.key)
    store = opened(disk, backup)
    assert_holds(store.read(chunk.key), chunk)
    assert store.flush(10)
    assert store.counters.get("corrupt", "disk") == store.counters.get("hits", "backup") == 1
    assert len(list((disk.root / "quarantine").iterdir())) == 1
    assert "quarantined" in caplog.text
    assert_holds(disk.read(chunk.key), chunk), "the good copy has been promoted"


def test_a_chunk_that_is_corrupt_everywhere_is_an_error_then_a_miss(
    opened: Callable[..., TieredStore], memory: MemoryTier, tmp_path: Path, disk: DiskTier
) -> None:
    backup = DiskTier(tmp_path / "backup", min_free=0, name="backup")
    for tier in (disk, backup):
        tier.write(make_chunk(1))
        damage(tier, make_key(1))
    store = opened(memory, disk, backup)
    with pytest.raises(ChunkCorrupt):
        store.read(make_key(1))
    assert store.counters.snapshot()["corrupt"] == {"disk": 1, "backup": 1}
    assert store.read(make_key(1)) is None


def test_what_has_been_written_since_is_not_quarantined(opened: Callable[..., TieredStore]) -> None:
    class Decaying(GatedTier):
        def read(self, *args: Any, **options: Any) -> Chunk | None:
            super().read(*args, **options)
            raise ChunkCorrupt("what was there when this read began")

    slow = Decaying(MemoryTier(MIB, name="slow"), "read")
    store = opened(slow)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(store.read, make_key(1))
        assert slow.entered.wait(10)
        store.write(make_chunk(1))
        assert store.flush(10)
        slow.gate.set()
        with pytest.raises(ChunkCorrupt):
            reading.result(10)
    assert_holds(slow.tier.read(make_key(1)), make_chunk(1))


def test_many_readers_of_a_corrupt_chunk_quarantine_it_once(
    opened: Callable[..., TieredStore], disk: DiskTier
) -> None:
    chunk = make_chunk(1)
    disk.write(chunk)
    damage(disk, chunk.key)
    slow = GatedTier(disk, "read")
    store = opened(slow)
    with pytest.raises(ChunkCorrupt):
        read_together(store, slow, 4, chunk)
    assert slow.calls.count("quarantine") == store.counters.get("corrupt") == 1


def test_a_corrupt_object_on_a_read_only_tier_is_passed_over(
    opened: Callable[..., TieredStore], disk: DiskTier
) -> None:
    disk.write(make_chunk(1))
    damage(disk, make_key(1))
    store = opened(ReadOnlyTier(disk))
    with pytest.raises(ChunkCorrupt):
        store.read(make_key(1))
    assert store.read(make_key(1)) is None


# Tiers that fail


def test_a_dead_tier_costs_one_delay_then_is_skipped_and_comes_back(
    opened: Callable[..., TieredStore], memory: MemoryTier, disk: DiskTier
) -> None:
    disk.write(make_chunk(1))
    slow = GatedTier(disk, "read", "leading")
    store = opened(memory, slow, limits={"disk": QUICK}, promote=False)
    memory.write(make_chunk(0))
    start = time.monotonic()
    with pytest.raises(TierTimeout):
        store.read(make_key(1))
    for _ in range(200):
        assert_holds(store.read(make_key(0)), make_chunk(0))
        assert len(store.leading([make_key(0), make_key(1)])) == 1
    assert time.monotonic() - start < BOUND
    assert len(slow.calls) <= 5, "it is skipped, and probed now and then"
    slow.gate.set()

    def back() -> bool:
        return len(store.leading([make_key(0), make_key(1)])) == 2

    assert eventually(back)
    assert_holds(store.read(make_key(1)), make_chunk(1))


def test_a_skipped_tier_is_an_error_not_a_miss(
    opened: Callable[..., TieredStore], memory: MemoryTier
) -> None:
    dead = FaultyTier(MemoryTier(MIB, name="slow"), {"read": [fail(TierUnavailable("gone"))]})
    store = opened(memory, dead)
    with pytest.raises(TierUnavailable, match="gone"):
        store.read(make_key(1))
    with pytest.raises(TierUnavailable, match="skipped"):
        store.read(make_key(1))
    assert store.counters.snapshot() == {"failures": {"slow": 2}}


def test_after_a_timeout_the_next_tier_serves(opened: Callable[..., TieredStore], disk: DiskTier) -> None:
    disk.write(make_chunk(1))
    hung = GatedTier(MemoryTier(MIB, name="hung"), "read")
    hung.tier.write(make_chunk(1))
    store = opened(hung, disk, limits={"hung": QUICK})
    start = time.monotonic()
    assert_holds(store.read(make_key(1)), make_chunk(1))
    assert time.monotonic() - start < BOUND


def test_after_a_timeout_nobody_else_writes_into_the_callers_memory(
    opened: Callable[..., TieredStore], tmp_path: Path, disk: DiskTier
) -> None:
    chunk = make_chunk(1)
    backup = MeteredTier(DiskTier(tmp_path / "backup", min_free=0, name="backup"))
    for tier in (disk, backup):
        tier.write(chunk)
    hung = GatedTier(disk, "read")
    store = opened(hung, backup, limits={"disk": QUICK})
    into = {slot: torch.zeros_like(chunk.tensor(slot)) for slot in chunk.payload}
    start = time.monotonic()
    with pytest.raises(TierTimeout):
        store.read(chunk.key, None, into)
    assert time.monotonic() - start < BOUND
    assert "read" not in backup.snapshot()
    assert not any(tensor.any() for tensor in into.values())
    hung.gate.set()
    late = into[SOME[0]].view(torch.uint8).flatten()
    assert eventually(lambda: torch.equal(late, chunk.payload[SOME[0]])), "the late read still fills it"
    assert_holds(store.read(chunk.key), chunk)


def test_a_slow_but_living_tier_is_not_given_up(opened: Callable[..., TieredStore], disk: DiskTier) -> None:
    store = opened(FaultyTier(disk, {"read": [hang(0.1)] * 3, "write": [hang(0.1)] * 3}))
    for n in range(3):
        store.write(make_chunk(n))
    assert store.flush(30)
    for n in range(3):
        assert_holds(store.read(make_key(n)), make_chunk(n))
    assert store.counters.snapshot() == {"hits": {"disk": 3}}


class _Watched(dict[Slot, torch.Tensor]):
    """A dict that a weak reference can watch."""


@pytest.mark.parametrize("slots", [None, [Slot(SlotKind.E, 9)]], ids=["read", "failed"])
def test_the_callers_memory_does_not_wait_for_the_garbage_collector(
    opened: Callable[..., TieredStore], memory: MemoryTier, disk: DiskTier, slots: list[Slot] | None
) -> None:
    disk.write(make_chunk(1))
    store = opened(memory, disk)

    def read() -> weakref.ref[_Watched]:
        into = _Watched({slot: torch.zeros(1) for slot in make_chunk(1).payload})
        with suppress(ChunkIncomplete):
            store.read(make_key(1), slots, into)
        return weakref.ref(into)

    gc.collect()
    gc.disable()
    try:
        held = read()
        assert eventually(lambda: held() is None)
    finally:
        gc.enable()


# Deleting


def test_delete_deletes_everywhere(
    opened: Callable[..., TieredStore], memory: MemoryTier, disk: DiskTier
) -> None:
    store = opened(memory, disk)
    store.write(make_chunk(1))
    assert store.flush(10)
    assert store.delete(make_key(1))
    assert not store.delete(make_key(1))
    assert list(memory.keys()) == list(disk.keys()) == []


def test_delete_of_what_waits(opened: Callable[..., TieredStore]) -> None:
    slow = GatedTier(MemoryTier(MIB, name="slow"), "write")
    store = opened(slow)
    store.write(make_chunk(0))
    assert slow.entered.wait(10)
    store.write(make_chunk(1))
    assert store.delete(make_key(1))
    assert store.read(make_key(1)) is None
    slow.gate.set()
    assert store.flush(10)
    assert list(store.keys()) == [make_key(0)]


def test_delete_of_what_is_being_written(opened: Callable[..., TieredStore]) -> None:
    slow = GatedTier(MemoryTier(MIB, name="slow"), "write")
    store = opened(slow)
    store.write(make_chunk(1))
    assert slow.entered.wait(10)
    with ThreadPoolExecutor(1) as pool:
        deleted = pool.submit(store.delete, make_key(1))
        time.sleep(0.05)
        assert not deleted.done()
        slow.gate.set()
        assert deleted.result(10)
    assert store.flush(10)
    assert list(slow.tier.keys()) == []


def test_delete_says_when_it_cannot(opened: Callable[..., TieredStore], memory: MemoryTier) -> None:
    slow = GatedTier(MemoryTier(MIB, name="slow"), "write")
    store = opened(memory, slow, write_back=FAST_END)
    store.write(make_chunk(1))
    assert slow.entered.wait(10)
    with pytest.raises(TierTimeout, match="under way"):
        store.delete(make_key(1))
    slow.gate.set()
    assert eventually(lambda: store.delete(make_key(1)) or store.head(make_key(1)) is None)
    assert list(slow.tier.keys()) == []


def test_a_read_from_before_does_not_bring_back_what_was_deleted(
    opened: Callable[..., TieredStore], memory: MemoryTier
) -> None:
    class Lagging(GatedTier):
        def read(self, *args: Any, **options: Any) -> Chunk | None:
            answer = self.tier.read(*args, **options)
            super().read(*args, **options)
            return answer

    slow = Lagging(MemoryTier(MIB, name="slow"), "read")
    slow.tier.write(make_chunk(1))
    store = opened(memory, slow)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(store.read, make_key(1))
        assert slow.entered.wait(10)
        assert store.delete(make_key(1))
        slow.gate.set()
        assert_holds(reading.result(10), make_chunk(1))
    assert store.flush(10)
    assert store.read(make_key(1)) is None
    assert list(memory.keys()) == []


# Pins, listing, quarantine


def test_the_pinned_stay_in_all_tiers(opened: Callable[..., TieredStore], tmp_path: Path) -> None:
    disk = DiskTier(tmp_path / "disk", min_free=0, capacity=3 * SIZE)
    memory = MemoryTier(2 * SIZE)
    store = opened(memory, disk)
    store.write(make_chunk(0))
    assert store.pin(make_key(0)), "also while it waits to be written"
    assert not store.pin(make_key(1))
    for n in range(1, 9):
        store.write(make_chunk(n))
        assert store.flush(10)
    assert memory.head(make_key(0))
    assert disk.head(make_key(0))
    assert store.unpin(make_key(0))
    for n in range(9, 14):
        store.write(make_chunk(n))
        assert store.flush(10)
    assert store.head(make_key(0)) is None
    assert not store.unpin(make_key(0))


def test_pins_where_it_can(opened: Callable[..., TieredStore], memory: MemoryTier, disk: DiskTier) -> None:
    disk.write(make_chunk(0))
    memory.write(make_chunk(0))
    store = opened(memory, ReadOnlyTier(disk))
    assert store.pin(make_key(0))
    memory.delete(make_key(0))
    with pytest.raises(TierUnavailable):
        store.pin(make_key(0))


def test_keys_and_usage(opened: Callable[..., TieredStore], memory: MemoryTier, disk: DiskTier) -> None:
    store = opened(memory, disk)
    for n in range(3):
        store.write(make_chunk(n))
    assert store.flush(10)
    forgets(store, make_key(0))
    assert sorted(store.keys()) == sorted(make_key(n) for n in range(3))
    assert store.by_tier() == {"cpu": memory.usage(), "disk": disk.usage()}
    assert (store.usage().chunks, store.usage().nbytes) == (3, 5 * SIZE)


def test_a_tier_that_cannot_be_listed(opened: Callable[..., TieredStore], memory: MemoryTier) -> None:
    dead = itertools.repeat(fail(TierUnavailable("dead")))
    slow = FaultyTier(MemoryTier(MIB, name="slow"), {"keys": dead, "usage": dead})
    store = opened(memory, slow)
    store.write(make_chunk(0))
    assert list(store.by_tier()) == ["cpu"]
    with pytest.raises(TierUnavailable):
        list(store.keys())


def test_quarantine_hides_from_all_tiers(
    opened: Callable[..., TieredStore], memory: MemoryTier, disk: DiskTier
) -> None:
    store = opened(memory, disk)
    store.write(make_chunk(0))
    assert store.flush(10)
    store.quarantine(make_key(0))
    assert store.read(make_key(0)) is None


@pytest.mark.parametrize("under_way", [True, False])
def test_quarantine_of_what_is_still_to_be_written(
    opened: Callable[..., TieredStore], memory: MemoryTier, under_way: bool
) -> None:
    slow = GatedTier(MemoryTier(MIB, name="slow"), "write")
    store = opened(memory, slow)
    store.write(make_chunk(0))
    assert slow.entered.wait(10)
    key = make_key(0 if under_way else 1)
    if not under_way:
        store.write(make_chunk(1))
    with ThreadPoolExecutor(1) as pool:
        quarantined = pool.submit(store.quarantine, key)
        time.sleep(0.05)
        assert quarantined.done() != under_way
        slow.gate.set()
        quarantined.result(10)
    assert store.flush(10)
    assert store.read(key) is None
    assert key not in set(store.keys())


def test_quarantine_needs_one_tier_that_answers(
    opened: Callable[..., TieredStore], memory: MemoryTier
) -> None:
    dead = FaultyTier(
        MemoryTier(MIB, name="slow"), {"quarantine": itertools.repeat(fail(TierUnavailable("x")))}
    )
    opened(memory, dead).quarantine(make_key(0))
    with pytest.raises(TierUnavailable):
        opened(dead).quarantine(make_key(0))


def test_quarantine_takes_what_waits_too(opened: Callable[..., TieredStore]) -> None:
    slow = GatedTier(MemoryTier(MIB, name="slow"), "write")
    store = opened(slow)
    store.write(make_chunk(0))
    assert slow.entered.wait(10)
    store.write(make_chunk(1))
    store.quarantine(make_key(1))
    assert store.read(make_key(1)) is None
    slow.gate.set()
    assert store.flush(10)
    assert list(slow.tier.keys()) == [make_key(0)]


def test_evicts_from_every_tier_or_from_one(
    opened: Callable[..., TieredStore], memory: MemoryTier, disk: DiskTier
) -> None:
    store = opened(memory, disk)
    for seed in range(4):
        store.write(make_chunk(seed))
    assert store.flush(10)
    cost = memory.footprint(make_chunk(0))
    assert store.evict(1) == cost + SIZE
    assert store.evict_from("cpu", cost) == cost
    assert store.evict_from("disk", 1 << 60) == 3 * SIZE
    assert (memory.usage().chunks, disk.usage().chunks) == (2, 0)
    assert_holds(store.read(make_key(3)), make_chunk(3))
    with pytest.raises(UsageError, match=r"no tier 'dsik' in store; allowed: cpu, disk"):
        store.evict_from("dsik", 1)


def test_evicts_from_the_tiers_that_answer(opened: Callable[..., TieredStore], memory: MemoryTier) -> None:
    dead = {"evict": itertools.repeat(fail(TierUnavailable("no disk")))}
    store = opened(memory, GatedTier(FaultyTier(MemoryTier(MIB), dead), name="dead"))
    store.write(make_chunk(0))
    assert store.evict(1) == memory.footprint(make_chunk(0))
    assert store.counters.get("failures", "dead") == 1
    with pytest.raises(TierUnavailable, match=r"no disk|skipped"):
        store.evict_from("dead", 1)
    alone = opened(GatedTier(FaultyTier(MemoryTier(MIB), dead), name="dead"))
    with pytest.raises(TierUnavailable, match="no disk"):
        alone.evict(1)


def test_best_read_is_the_slowest_tiers(
    opened: Callable[..., TieredStore], memory: MemoryTier, disk: DiskTier
) -> None:
    disk.best_read = 12345  # type: ignore[misc]
    assert opened(memory, disk).best_read == 12345


# Storms


def test_writers_readers_and_deleters_agree(opened: Callable[..., TieredStore], disk: DiskTier) -> None:
    """Each thread owns a key; whatever the others do, it reads what it wrote last."""
    store = opened(MemoryTier(3 * SIZE), disk, write_back=WriteBackOptions(capacity=4 * SIZE, put_timeout=30))
    versions = [[make_chunk(10 * n + v, key=make_key(n)) for v in range(3)] for n in range(6)]

    def work(n: int) -> None:
        for step in range(40):
            chunk = versions[n][step % 3]
            store.write(chunk)
            assert_holds(store.read(chunk.key, SOME), chunk, SOME)
            if n and (step + n) % 5 == 0:
                store.tiers[0].delete(make_key(n - 1))
            assert_holds(store.read(chunk.key), chunk)
            if step % 7 == 6:
                assert store.delete(chunk.key)
                assert store.read(chunk.key) is None

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, n) for n in range(6)]:
            done.result(60)
    assert store.flush(30)
    assert not {"corrupt", "failures", "write_failures", "writes_dropped"} & set(store.counters.snapshot())
    for chunks in versions:
        assert_holds(disk.read(chunks[0].key), chunks[39 % 3])


# The end


def test_what_flush_has_acknowledged_is_there_for_another_process(
    opened: Callable[..., TieredStore], tmp_path: Path
) -> None:
    store = opened(MemoryTier(MIB), LatencyTier(DiskTier(tmp_path / "disk", min_free=0), delay=0.01))
    for n in range(10):
        store.write(make_chunk(n))
    assert store.flush(30)
    with DiskTier(tmp_path / "disk", min_free=0) as other:
        for n in range(10):
            assert_holds(other.read(make_key(n)), make_chunk(n))


def test_close_writes_what_waits(tmp_path: Path) -> None:
    with TieredStore([LatencyTier(DiskTier(tmp_path, min_free=0), delay=0.01)]) as store:
        for n in range(10):
            store.write(make_chunk(n))
    store.close()
    with DiskTier(tmp_path, min_free=0) as disk:
        assert disk.usage().chunks == 10


def test_closing_over_a_hung_tier_returns(
    opened: Callable[..., TieredStore], memory: MemoryTier, caplog: pytest.LogCaptureFixture
) -> None:
    hung = GatedTier(MemoryTier(MIB, name="hung"), "write", "read", "close")
    store = opened(memory, hung, limits={"hung": QUICK}, write_back=FAST_END)
    store.write(make_chunk(0))
    with pytest.raises(TierTimeout):
        store.read(make_key(1))
    start = time.monotonic()
    store.close()
    assert time.monotonic() - start < BOUND
    assert "not closed" in caplog.text
    hung.gate.set()
    assert eventually(lambda: hung.ended[-1:] == ["close"])


def test_nothing_runs_after_closing(tmp_path: Path) -> None:
    with TieredStore([MemoryTier(MIB), DiskTier(tmp_path, min_free=0, name="mine")]) as store:
        for n in range(5):
            store.write(make_chunk(n))
            forgets(store, make_key(n))
            store.read(make_key(n))
    ours = ("droidspeak write mine", "droidspeak tier mine", "droidspeak promote")
    assert eventually(lambda: not any(thread.name in ours for thread in threading.enumerate()))
    store.write(make_chunk(1))  # into memory, which has no end
    with pytest.raises(TierUnavailable, match="closed"):
        store.delete(make_key(1))


def test_a_process_over_a_hung_tier_can_end() -> None:
    script = """
        import threading
        from droidspeak.errors import TierTimeout
        from droidspeak.storage import Limits, TieredStore
        from droidspeak.storage.memory import MemoryTier
        from droidspeak.storage.testing import make_chunk, make_key
        from droidspeak.storage.wrappers import WrapperTier

        class Hung(WrapperTier):
            def _around(self, call):
                threading.Event().wait()

        tier = Hung(MemoryTier(1 << 20, name="hung"))
        tier.in_memory = False
        store = TieredStore([tier], limits={"hung": Limits(read_deadline=0.1)})
        store.write(make_chunk(0))
        try:
            store.read(make_key(1))
        except TierTimeout:
            print("ended")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr
