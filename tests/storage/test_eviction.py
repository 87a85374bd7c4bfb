"""Eviction: the ledger, LRU order, and S3-FIFO step by step."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droidspeak.errors import ConfigError
from droidspeak.storage.eviction import (
    LRU,
    MAIN,
    S3FIFO,
    SMALL,
    Entry,
    EvictionPolicy,
    MemoryLedger,
    get_eviction,
)
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.testing import make_key

POLICIES = [LRU, S3FIFO]


class Cache:
    """A tier reduced to what eviction sees: sizes and a capacity."""

    def __init__(self, policy: EvictionPolicy, capacity: int = 10) -> None:
        self.policy, self.capacity, self.ledger = policy, capacity, MemoryLedger()
        self.held: dict[int, int] = {}
        self.evicted: list[int] = []

    def use(self, seed: int, nbytes: int = 1) -> bool:
        """A hit, or an insertion that evicts as long as it must."""
        key = make_key(seed)
        if seed in self.held:
            self.policy.touch(self.ledger, key)
            return True
        while self.ledger.nbytes() + nbytes > self.capacity:
            victim = self.policy.victim(self.ledger)
            if victim is None:
                return False
            assert not victim.pinned
            self.drop(victim.key)
        self.policy.admit(self.ledger, key, nbytes)
        self.held[seed] = nbytes
        return False

    def drop(self, key: ChunkKey) -> None:
        self.ledger.remove(key)
        seed = next(seed for seed in self.held if make_key(seed) == key)
        del self.held[seed]
        self.evicted.append(seed)

    def use_all(self, seeds: Iterable[int]) -> None:
        for seed in seeds:
            self.use(seed)

    def queue(self, seed: int) -> str:
        entry = self.ledger.get(make_key(seed))
        assert entry is not None
        return entry.queue


# The ledger


def test_a_ledger_keeps_fifo_order_and_bytes() -> None:
    ledger = MemoryLedger()
    for seed in range(4):
        ledger.put(Entry(make_key(seed), 10 + seed, queue=MAIN if seed % 2 else SMALL))
    assert (ledger.nbytes(), ledger.nbytes(MAIN), ledger.nbytes(SMALL)) == (46, 24, 22)
    assert ledger.oldest(MAIN) == Entry(make_key(1), 11)
    ledger.put(Entry(make_key(1), 50))
    assert ledger.oldest(MAIN) == Entry(make_key(3), 13)
    ledger.put(Entry(make_key(0), 1, queue=MAIN))
    assert (ledger.nbytes(), ledger.nbytes(MAIN), ledger.nbytes(SMALL)) == (76, 64, 12)
    ledger.remove(make_key(3))
    ledger.remove(make_key(99))
    assert ledger.oldest(MAIN) == Entry(make_key(1), 50)
    assert ledger.get(make_key(3)) is None
    assert ledger.nbytes("no such queue") == 0
    assert ledger.oldest("no such queue") is None


def test_hits_and_pins_leave_an_entry_where_it_stands() -> None:
    ledger = MemoryLedger()
    for seed in range(3):
        ledger.put(Entry(make_key(seed), 1))
    ledger.set_hits(make_key(0), 7)
    assert ledger.oldest(MAIN) == Entry(make_key(0), 1, hits=7)
    ledger.set_pinned(make_key(0), True)
    assert ledger.oldest(MAIN) == Entry(make_key(1), 1)
    assert ledger.nbytes() == 3
    ledger.set_pinned(make_key(0), False)
    assert ledger.oldest(MAIN) == Entry(make_key(0), 1, hits=7)


def test_ghosts_are_bounded_and_leave_once() -> None:
    ledger = MemoryLedger(max_ghosts=2)
    for seed in range(3):
        ledger.remember_ghost(make_key(seed))
    assert not ledger.forget_ghost(make_key(0))
    assert ledger.forget_ghost(make_key(2))
    assert not ledger.forget_ghost(make_key(2))
    assert ledger.forget_ghost(make_key(1))


# All policies


@pytest.mark.parametrize("policy", POLICIES)
def test_an_empty_ledger_has_no_victim(policy: type[EvictionPolicy]) -> None:
    assert policy().victim(MemoryLedger()) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_touching_the_unknown_does_nothing(policy: type[EvictionPolicy]) -> None:
    ledger = MemoryLedger()
    policy().touch(ledger, make_key(1))
    assert ledger.get(make_key(1)) is None
    assert ledger.nbytes() == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_when_all_are_pinned_nobody_leaves(policy: type[EvictionPolicy]) -> None:
    cache = Cache(policy())
    for seed in range(10):
        cache.use(seed)
        cache.ledger.set_pinned(make_key(seed), True)
    assert cache.policy.victim(cache.ledger) is None
    cache.ledger.set_pinned(make_key(4), False)
    victim = cache.policy.victim(cache.ledger)
    assert victim is not None
    assert victim.key == make_key(4)


_STEPS = st.lists(
    st.tuples(st.sampled_from(["use", "pin", "unpin"]), st.integers(0, 15), st.integers(1, 9)), max_size=80
)


@pytest.mark.parametrize("policy", POLICIES)
@given(steps=_STEPS)
def test_after_any_steps_there_is_room_for_all_but_the_pinned(
    policy: type[EvictionPolicy], steps: list[tuple[str, int, int]]
) -> None:
    cache = Cache(policy(), capacity=30)
    pinned: set[int] = set()
    for step, seed, nbytes in steps:
        if step == "use":
            cache.use(seed, nbytes)
        elif seed in cache.held:
            cache.ledger.set_pinned(make_key(seed), step == "pin")
            pinned = pinned | {seed} if step == "pin" else pinned - {seed}
        assert pinned <= cache.held.keys()
        assert cache.ledger.nbytes() == sum(cache.held.values()) <= 30
        assert cache.ledger.nbytes(MAIN) + cache.ledger.nbytes(SMALL) == cache.ledger.nbytes()
    while victim := cache.policy.victim(cache.ledger):
        cache.drop(victim.key)
    assert cache.held.keys() == pinned


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_by_name(policy: type[EvictionPolicy]) -> None:
    assert type(get_eviction(policy.name)) is policy


def test_an_unknown_policy() -> None:
    with pytest.raises(ConfigError, match="unknown eviction 'random'; allowed: lru, s3-fifo"):
        get_eviction("random")


# LRU


def test_lru_evicts_the_least_recently_used() -> None:
    cache = Cache(LRU(), capacity=4)
    cache.use_all([0, 1, 2, 3, 0, 2])
    cache.use_all([10, 11, 12, 13])
    assert cache.evicted == [1, 3, 0, 2]


@given(st.lists(st.integers(0, 9), max_size=100))
def test_lru_is_the_textbook_lru(seeds: list[int]) -> None:
    cache, recent = Cache(LRU(), capacity=4), list[int]()
    for seed in seeds:
        assert cache.use(seed) == (seed in recent)
        recent = [*(other for other in recent if other != seed), seed][-4:]
        assert set(cache.held) == set(recent)


def test_lru_counts_hits() -> None:
    cache = Cache(LRU())
    cache.use_all([1, 1, 1])
    entry = cache.ledger.get(make_key(1))
    assert entry is not None
    assert entry.hits == 2


# S3-FIFO


def test_newcomers_are_on_probation_and_leave_in_order() -> None:
    cache = Cache(S3FIFO())
    cache.use_all(range(13))
    assert cache.evicted == [0, 1, 2]
    assert {cache.queue(seed) for seed in cache.held} == {SMALL}


def test_one_more_use_is_not_enough_to_stay() -> None:
    cache = Cache(S3FIFO())
    cache.use_all([*range(10), 0])
    cache.use(10)
    assert cache.evicted == [0]


def test_two_more_uses_lead_into_the_main_queue() -> None:
    cache = Cache(S3FIFO())
    cache.use_all([*range(10), 0, 0])
    cache.use(10)
    assert cache.evicted == [1]
    assert cache.queue(0) == MAIN
    entry = cache.ledger.get(make_key(0))
    assert entry is not None
    assert entry.hits == 0


def test_ghosts_come_back_into_the_main_queue() -> None:
    cache = Cache(S3FIFO())
    cache.use_all(range(11))
    assert cache.evicted == [0]
    cache.use(0)
    assert cache.queue(0) == MAIN
    cache.ledger.remove(make_key(0))
    del cache.held[0]
    cache.use(0)
    assert cache.queue(0) == SMALL


def test_hits_count_to_three() -> None:
    cache = Cache(S3FIFO())
    cache.use_all([0] * 20)
    entry = cache.ledger.get(make_key(0))
    assert entry is not None
    assert entry.hits == 3


def test_the_main_queue_gives_used_ones_another_round() -> None:
    ledger, policy = MemoryLedger(), S3FIFO()
    for seed, hits in enumerate([2, 0, 1]):
        ledger.put(Entry(make_key(seed), 1, queue=MAIN, hits=hits))
    order = []
    while victim := policy.victim(ledger):
        ledger.remove(victim.key)
        order.append(victim.key)
    assert order == [make_key(1), make_key(2), make_key(0)]


def test_main_victims_are_no_ghosts() -> None:
    ledger, policy = MemoryLedger(), S3FIFO()
    ledger.put(Entry(make_key(0), 1, queue=MAIN))
    assert policy.victim(ledger)
    assert not ledger.forget_ghost(make_key(0))


def test_the_main_queue_gives_way_while_the_small_one_is_below_its_share() -> None:
    ledger, policy = MemoryLedger(), S3FIFO()
    for seed in range(1, 20):
        ledger.put(Entry(make_key(seed), 1, queue=MAIN))
    ledger.put(Entry(make_key(0), 1, queue=SMALL))
    victim = policy.victim(ledger)
    assert victim is not None
    assert victim.key == make_key(1)
    ledger.put(Entry(make_key(20), 2, queue=SMALL))
    victim = policy.victim(ledger)
    assert victim is not None
    assert victim.key == make_key(0)


def test_a_scan_does_not_wash_out_what_is_used() -> None:
    hot, scan = range(5), range(100, 400)
    survivors = {}
    for policy in POLICIES:
        cache = Cache(policy())
        for _ in range(4):
            cache.use_all(hot)
        cache.use_all(scan)
        survivors[policy] = set(hot) & cache.held.keys()
    assert survivors == {LRU: set(), S3FIFO: set(hot)}
