"""The guard: deadlines, breakers, turns, and an end that always comes."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import TypeVar

import pytest

from droidspeak.errors import (
    ChunkCorrupt,
    ChunkIncomplete,
    ConfigError,
    TierFull,
    TierTimeout,
    TierUnavailable,
)
from droidspeak.storage.breaker import BreakerState
from droidspeak.storage.container import Chunk, Slot, SlotKind
from droidspeak.storage.deadline import DeadlineThreads
from droidspeak.storage.guard import GuardedTier, Limits
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.testing import assert_holds, make_chunk, make_key
from droidspeak.storage.tier import Tier
from droidspeak.storage.wrappers import Call, FaultyTier, WrapperTier, fail

from .gates import QUICK, GatedTier, eventually

MIB = 1 << 20
CHUNK = make_chunk(0)
T = TypeVar("T")
BOUND = 5.0
"""Seconds that "a bounded delay" may take on a busy machine; the deadlines are far shorter."""


@pytest.fixture
def memory() -> MemoryTier:
    tier = MemoryTier(MIB, name="slow")
    tier.write(CHUNK)
    return tier


def threads_of(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"droidspeak tier {name}"]


# What passes through


def test_calls_pass_through(memory: MemoryTier) -> None:
    with GuardedTier(GatedTier(memory)) as guard:
        assert guard.head(CHUNK.key) == memory.head(CHUNK.key)
        assert guard.leading([CHUNK.key, make_key(1)]) == [memory.head(CHUNK.key)]
        assert_holds(guard.read(CHUNK.key, Slot.kv([1])), CHUNK, Slot.kv([1]))
        guard.write(make_chunk(1))
        assert set(guard.keys()) == {CHUNK.key, make_key(1)}
        assert guard.usage() == memory.usage()
        assert guard.pin(CHUNK.key)
        assert guard.unpin(CHUNK.key)
        assert guard.delete(CHUNK.key)
        guard.quarantine(make_key(1))
        assert list(guard.keys()) == []


def test_memory_is_called_directly(memory: MemoryTier) -> None:
    callers = []

    class Watched(WrapperTier):
        def _around(self, call: Call[T]) -> T:
            callers.append(threading.current_thread())
            return call.run()

    with GuardedTier(Watched(memory)) as guard:
        guard.read(CHUNK.key)
        guard.write(CHUNK)
    assert set(callers) == {threading.current_thread()}


@pytest.mark.parametrize("error", [ChunkCorrupt("bad"), ChunkIncomplete("part"), TierFull("full")], ids=str)
def test_an_answer_that_is_an_error_is_no_outage(memory: MemoryTier, error: Exception) -> None:
    tier = FaultyTier(memory, {"read": repeat(fail(error)), "write": repeat(fail(error))})
    with GuardedTier(tier, QUICK) as guard:
        for _ in range(3):
            with pytest.raises(type(error)):
                guard.read(CHUNK.key)
            with pytest.raises(type(error)):
                guard.write(CHUNK)
        assert guard.reading is guard.writing is BreakerState.CLOSED


def test_an_error_that_is_no_storage_error_passes_too(memory: MemoryTier) -> None:
    class Buggy(WrapperTier):
        def head(self, key: ChunkKey) -> None:
            raise ZeroDivisionError

    tier = Buggy(memory)
    tier.in_memory = False
    with GuardedTier(tier, QUICK) as guard:
        with pytest.raises(ZeroDivisionError):
            guard.head(CHUNK.key)
        assert guard.read(CHUNK.key) is not None


@pytest.mark.parametrize("name", ["read_deadline", "write_deadline", "threshold", "cooldown", "threads"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: 0})


# Deadlines


def test_a_hung_tier_costs_one_bounded_delay_then_nothing(
    memory: MemoryTier, caplog: pytest.LogCaptureFixture
) -> None:
    tier = GatedTier(memory, "read", "head")
    guard = GuardedTier(tier, Limits(read_deadline=0.2, write_deadline=0.2, cooldown=60))
    start = time.monotonic()
    with pytest.raises(TierTimeout, match="slow did not answer within"):
        guard.read(CHUNK.key)
    for _ in range(50):
        with pytest.raises(TierUnavailable, match="skipped"):
            guard.head(CHUNK.key)
    assert time.monotonic() - start < BOUND
    assert tier.calls == ["read"]
    assert guard.reading is BreakerState.OPEN
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    tier.gate.set()
    guard.close()


def test_comes_back_after_the_cooldown(memory: MemoryTier, caplog: pytest.LogCaptureFixture) -> None:
    tier = GatedTier(memory, "read")
    with GuardedTier(tier, QUICK) as guard:
        with pytest.raises(TierTimeout):
            guard.read(CHUNK.key)
        tier.gate.set()
        assert eventually(lambda: guard.reading is BreakerState.CLOSED or _tried(guard))
        assert_holds(guard.read(CHUNK.key), CHUNK)
    assert [record.message.split(" tier ")[0] for record in caplog.records] == ["reading", "reading"]
    assert "again" in caplog.text


def test_a_probe_that_is_answered_with_an_error_ends_the_outage(memory: MemoryTier) -> None:
    tier = FaultyTier(memory, {"read": [fail(TierUnavailable("dead")), fail(ChunkCorrupt("bad"))]})
    with GuardedTier(tier, QUICK) as guard:
        with pytest.raises(TierUnavailable, match="dead"):
            guard.read(CHUNK.key)
        time.sleep(QUICK.cooldown)
        with pytest.raises(ChunkCorrupt):
            guard.read(CHUNK.key)
        assert guard.reading is BreakerState.CLOSED


def _tried(guard: GuardedTier) -> bool:
    try:
        return guard.read(CHUNK.key) is not None
    except TierUnavailable:
        return False


def test_a_tier_that_cannot_be_written_is_still_read(
    memory: MemoryTier, caplog: pytest.LogCaptureFixture
) -> None:
    tier = FaultyTier(memory, {"write": repeat(fail(TierUnavailable("read-only medium")))})
    with GuardedTier(tier, QUICK) as guard:
        for _ in range(10):
            with pytest.raises(TierUnavailable):
                guard.write(make_chunk(1))
            assert_holds(guard.read(CHUNK.key), CHUNK)
            time.sleep(0.02)
    assert len(caplog.records) == 1, "one outage is told once, however many probes fail"


def test_a_full_tier_is_told_once_until_it_has_room(
    memory: MemoryTier, caplog: pytest.LogCaptureFixture
) -> None:
    full = fail(TierFull("no room"))
    tier = FaultyTier(memory, {"write": [full, full, None, full]})
    with GuardedTier(tier, QUICK) as guard:
        for fails in (True, True, False, True):
            if fails:
                with pytest.raises(TierFull):
                    guard.write(CHUNK)
            else:
                guard.write(CHUNK)
    assert [record.message for record in caplog.records] == ["tier slow is full: no room"] * 2


def test_a_timeout_of_the_tiers_own_is_passed_on(memory: MemoryTier) -> None:
    own = TierTimeout("the tier's own")
    with GuardedTier(FaultyTier(memory, {"read": [fail(own)]}), QUICK) as guard:
        with pytest.raises(TierTimeout) as caught:
            guard.read(CHUNK.key)
        assert caught.value is own


def test_listing_a_hung_tier_ends(memory: MemoryTier) -> None:
    class HungListing(WrapperTier):
        gate = threading.Event()

        def keys(self) -> Iterator[ChunkKey]:
            yield CHUNK.key
            self.gate.wait(30)
            yield make_key(1)

    tier = HungListing(memory)
    tier.in_memory = False
    guard = GuardedTier(tier, QUICK)
    with pytest.raises(TierTimeout):
        list(guard.keys())
    tier.gate.set()
    guard.close()


def test_long_listings_come_whole() -> None:
    class Long(MemoryTier):
        def keys(self) -> Iterator[ChunkKey]:
            return iter([make_key(n) for n in range(2500)])

    tier = Long(MIB)
    tier.in_memory = False
    with GuardedTier(tier) as guard:
        assert len(set(guard.keys())) == 2500


# Threads


def test_as_many_calls_at_once_as_there_are_threads(memory: MemoryTier) -> None:
    together = threading.Barrier(8, timeout=10)

    class Meeting(WrapperTier):
        def _around(self, call: Call[T]) -> T:
            together.wait()
            return call.run()

    tier = Meeting(memory)
    tier.in_memory = False
    with GuardedTier(tier, Limits(threads=8)) as guard, ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for done in [pool.submit(guard.head, CHUNK.key) for _ in range(8)]:
                assert done.result(10)
        assert len(threads_of("slow")) == 8


def test_a_call_that_has_not_begun_at_its_deadline_never_does() -> None:
    threads = DeadlineThreads(1, "tier one")
    gate, made = threading.Event(), []
    with pytest.raises(TierTimeout):
        threads.run(lambda: gate.wait(30), 0.05)
    with pytest.raises(TierTimeout):
        threads.run(lambda: made.append("late"), 0.05)
    gate.set()
    threads.run(lambda: made.append("in time"), 10)
    assert made == ["in time"]
    threads.close(lambda: None, 10)


def test_what_was_read_is_not_kept_alive(memory: MemoryTier) -> None:
    class Fresh(WrapperTier):
        def read(self, *args: object, **options: object) -> Chunk:
            return make_chunk(5)

    tier = Fresh(memory)
    tier.in_memory = False
    with GuardedTier(tier) as guard:
        chunk = guard.read(CHUNK.key)
        assert chunk is not None
        held = weakref.ref(chunk)
        del chunk
        gc.collect()
        assert held() is None


# Changes that overstay


def test_a_delete_waits_for_a_late_write(memory: MemoryTier) -> None:
    tier = GatedTier(memory, "write")
    late = make_chunk(7)
    with GuardedTier(tier, Limits(write_deadline=0.3, cooldown=0.01)) as guard, ThreadPoolExecutor(1) as pool:
        with pytest.raises(TierTimeout):
            guard.write(late)
        assert eventually(lambda: guard._writing.breaker._clock() > (guard._writing.breaker._retry_at or 0))
        deleted = pool.submit(guard.delete, late.key)
        time.sleep(0.05)
        assert "delete" not in tier.calls
        tier.gate.set()
        assert deleted.result(10)
        assert tier.ended == ["write", "delete"]
        assert memory.read(late.key) is None


def test_a_corrupt_object_is_quarantined_unless_it_has_been_replaced(memory: MemoryTier) -> None:
    with GuardedTier(GatedTier(memory), QUICK) as guard:
        stamp = guard.stamp(CHUNK.key)
        guard.write(CHUNK)
        guard.quarantine(CHUNK.key, since=stamp)
        assert_holds(guard.read(CHUNK.key), CHUNK)
        guard.quarantine(CHUNK.key, since=guard.stamp(CHUNK.key))
        assert guard.read(CHUNK.key) is None


# The end


def test_closing_ends_the_threads_and_refuses_calls(memory: MemoryTier) -> None:
    tier = GatedTier(memory)
    guard = GuardedTier(tier, QUICK)
    guard.head(CHUNK.key)
    guard.close()
    guard.close()
    assert tier.ended == ["head", "close"]
    assert eventually(lambda: not threads_of("slow"))
    with pytest.raises(TierUnavailable, match="closed"):
        guard.head(CHUNK.key)


def test_a_tier_is_not_closed_under_a_running_call(memory: MemoryTier) -> None:
    tier = GatedTier(memory, "read")
    guard = GuardedTier(tier)
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(guard.read, CHUNK.key)
        assert tier.entered.wait(10)
        closing = pool.submit(guard.close)
        time.sleep(0.05)
        assert tier.calls == ["read"]
        tier.gate.set()
        assert_holds(reading.result(10), CHUNK)
        closing.result(10)
    assert tier.ended == ["read", "close"]


@pytest.mark.parametrize("hung", ["read", "close"])
def test_closing_a_hung_tier_returns(memory: MemoryTier, hung: str, caplog: pytest.LogCaptureFixture) -> None:
    tier = GatedTier(memory, hung)
    guard = GuardedTier(tier, QUICK)
    if hung == "read":
        with pytest.raises(TierTimeout):
            guard.read(CHUNK.key)
    start = time.monotonic()
    guard.close()
    assert time.monotonic() - start < BOUND
    assert "not closed" in caplog.text
    tier.gate.set()
    assert eventually(lambda: tier.ended[-1:] == ["close"]), "it is closed when what hung has ended"
    assert eventually(lambda: not threads_of("slow"))


def test_slots_and_memory_reach_the_tier(memory: MemoryTier) -> None:
    got: list[object] = []

    class Noting(WrapperTier):
        def read(self, key: ChunkKey, slots: object = None, into: object = None) -> None:
            got.append((key, slots, into))

    tier: Tier = Noting(memory)
    tier.in_memory = False  # type: ignore[misc]
    into = {Slot(SlotKind.K, 0): CHUNK.tensor(Slot(SlotKind.K, 0))}
    with GuardedTier(tier) as guard:
        guard.read(CHUNK.key, Slot.kv([0]), into)
    assert got[0][:2] == (CHUNK.key, Slot.kv([0]))
    assert got[0][2] is into
