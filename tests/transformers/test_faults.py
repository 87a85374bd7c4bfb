"""Faults: whatever the store does, the answer is the plain model's, and the outcome says what happened."""

from __future__ import annotations

import os
import shutil
import threading
import time
from itertools import repeat

import pytest
import torch

from droidspeak.connector import Outcome, Reason, Status
from droidspeak.errors import TierFull, TierTimeout, TierUnavailable
from droidspeak.layerselect import PolicySet
from droidspeak.storage import ChunkKey, Limits, TieredStore
from droidspeak.storage.disk import DiskTier
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.wrappers import FaultyTier, LatencyTier, ReadOnlyTier, WrapperTier, fail, hang

from .sharing import SIZE, ask, door, fill, greedy, memory, policy
from .tiny_models import tiny_model, tokens

IDS = tokens(3 * SIZE + 5, seed=1)
CUT = 3 * SIZE
MODEL, OTHER = tiny_model("llama"), tiny_model("llama", seed=7)
PLAIN = greedy(MODEL, IDS[None])


def assert_fallback(droid, reason: Reason, **options) -> Outcome:
    """The next request is answered as without a cache, says so, and is counted."""
    counters = droid.connector.counters
    before = counters.get("reasons", reason.value), counters.get("requests", "fallback_reprefill")
    answer, outcome = ask(droid, IDS, **options)
    assert torch.equal(answer, PLAIN)
    assert (outcome.reason, outcome.status) == (reason, Status.FALLBACK_REPREFILL)
    assert (outcome.exact_tokens, outcome.shared_tokens, outcome.plan, outcome.source) == (0, 0, None, None)
    after = counters.get("reasons", reason.value), counters.get("requests", "fallback_reprefill")
    assert after == (before[0] + 1, before[1] + 1)
    droid.flush()
    return outcome


def assert_exact(droid) -> None:
    answer, outcome = ask(droid, IDS)
    assert torch.equal(answer, PLAIN)
    assert (outcome.reason, outcome.exact_tokens) == (Reason.EXACT_HIT, CUT)


# Damaged files


def truncated(files) -> None:
    os.truncate(files[1], files[1].stat().st_size // 2)


def emptied(files) -> None:
    os.truncate(files[1], 0)


def lengthened(files) -> None:
    with files[1].open("ab") as file:
        file.write(b"\0")


def flipped_payload(files) -> None:
    _flip(files[1], -1)


def flipped_header(files) -> None:
    _flip(files[1], 100)


def flipped_length(files) -> None:
    _flip(files[1], 0)


def _flip(path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def swapped(files) -> None:
    spare = files[0].with_suffix(".spare")
    files[0].rename(spare)
    files[1].rename(files[0])
    spare.rename(files[1])


def renamed(files) -> None:
    shutil.copy(files[0], files[1])


def of_zeros(files) -> None:
    files[1].write_bytes(bytes(files[1].stat().st_size))


DAMAGES = [
    truncated,
    emptied,
    lengthened,
    flipped_payload,
    flipped_header,
    flipped_length,
    swapped,
    renamed,
    of_zeros,
]


class Disk:
    """A folder of chunks, opened bare or in a store."""

    def __init__(self, tmp_path, kind: str) -> None:
        self.tier = DiskTier(tmp_path / "store", min_free=0)
        self.store = TieredStore([self.tier]) if kind == "tiered" else self.tier

    def settle(self) -> None:
        if isinstance(self.store, TieredStore):
            self.store.flush()

    def files(self, droid) -> list:
        """The chunk files of one model, in the prompt's order."""
        hashes = [info.key for info in droid.connector.lookup(IDS, droid.manifest).exact]
        return [self.tier.path(key) for key in hashes]


@pytest.fixture(params=["bare", "tiered"])
def disk(request, tmp_path):
    opened = Disk(tmp_path, request.param)
    with opened.store:
        yield opened


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_own_chunks_damaged_on_disk(disk, damage, codec):
    droid = door(MODEL, disk.store, codec=codec)
    fill(droid, IDS)
    disk.settle()
    assert_exact(droid)
    damage(disk.files(droid))
    assert_fallback(droid, Reason.CORRUPT)
    disk.settle()
    # The damaged file is out of sight, and the prefill has put a sound one in its place.
    assert_exact(droid)
    if isinstance(disk.store, TieredStore):
        assert disk.store.counters.get("corrupt", "disk") >= 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_senders_chunks_damaged_on_disk(disk, damage):
    policies = PolicySet()
    sender = door(OTHER, disk.store, policies)
    receiver = door(MODEL, disk.store, policies, save=False)
    policies.add(policy(sender, receiver, "1-2"))
    fill(sender, IDS)
    disk.settle()
    files = disk.files(sender)
    damage(files)
    outcome = assert_fallback(receiver, Reason.CORRUPT)
    assert outcome.wait_seconds >= 0
    damaged = 0 if damage is swapped else 1
    assert receiver.connector.lookup(IDS, receiver.manifest).shared_tokens in (0, damaged * SIZE)
    for _ in range(2):
        _, outcome = ask(receiver, IDS)
    assert outcome.shared_tokens == damaged * SIZE


def test_a_file_that_was_deleted(disk):
    droid = door(MODEL, disk.store)
    fill(droid, IDS)
    disk.settle()
    disk.files(droid)[1].unlink()
    assert_fallback(droid, Reason.EVICTED)
    disk.settle()
    assert_exact(droid)


def test_the_whole_folder_was_deleted(disk):
    droid = door(MODEL, disk.store)
    fill(droid, IDS)
    disk.settle()
    shutil.rmtree(disk.tier.root / "chunks")
    assert_fallback(droid, Reason.EVICTED)


# Between lookup and load


class Between(WrapperTier):
    """Does something once, between the lookup and the first read."""

    def __init__(self, tier, action) -> None:
        super().__init__(tier)
        self.action = action

    def leading(self, keys):
        found = super().leading(keys)
        if found and self.action:
            action, self.action = self.action, None
            action([info.key for info in found])
        return found


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_chunk_that_leaves_between_lookup_and_load(victim):
    inner = memory()
    fill(door(MODEL, inner), IDS)
    droid = door(MODEL, Between(inner, lambda keys: inner.delete(keys[victim])))
    assert_fallback(droid, Reason.EVICTED)
    assert_exact(droid)


def test_e_that_leaves_between_lookup_and_load():
    inner, policies = memory(), PolicySet()
    sender = door(OTHER, inner, policies)
    # The sender stores its chunks anew, without the E that no policy needs any more.
    without = memory()
    fill(door(OTHER, without), IDS)

    def replace(keys: list[ChunkKey]) -> None:
        for key in keys:
            inner.write(without.read(key))

    receiver = door(MODEL, Between(inner, replace), policies, save=False)
    policies.add(policy(sender, receiver, "1-2"))
    fill(sender, IDS)
    assert_fallback(receiver, Reason.EVICTED)
    assert_fallback(receiver, Reason.E_MISSING)


# Stores that cannot be written


def full() -> MemoryTier:
    return MemoryTier(1000)


@pytest.mark.parametrize(
    "make",
    [
        full,
        lambda: ReadOnlyTier(memory()),
        lambda: TieredStore([full()]),
        lambda: FaultyTier(memory(), {"write": repeat(fail(TierUnavailable("down")))}),
        lambda: FaultyTier(memory(), {"write": repeat(fail(TierTimeout("slow")))}),
        lambda: FaultyTier(memory(), {"write": repeat(fail(TierFull("full")))}),
    ],
    ids=["full", "read-only", "full in a store", "unavailable", "timeout", "says full"],
)
def test_a_store_that_cannot_be_written(make):
    droid = door(MODEL, make())
    for _ in range(2):
        assert_fallback(droid, Reason.MISS)
    counters = droid.connector.counters
    assert (counters.get("save_failures"), counters.get("chunks_saved")) == (6, 0)


def test_a_full_disk(tmp_path):
    with DiskTier(tmp_path, capacity=1000, min_free=0) as store:
        droid = door(MODEL, store)
        assert_fallback(droid, Reason.MISS)
        assert droid.connector.counters.get("save_failures") == 3


def test_a_disk_that_turns_read_only(tmp_path):
    with DiskTier(tmp_path, min_free=0) as writer:
        fill(door(MODEL, writer), IDS[: SIZE + 1])
    with DiskTier(tmp_path, read_only=True) as store:
        droid = door(MODEL, store)
        answer, outcome = ask(droid, IDS)
        droid.flush()
        assert torch.equal(answer, PLAIN)
        assert (outcome.reason, outcome.exact_tokens) == (Reason.EXACT_HIT, SIZE)
        assert droid.connector.counters.get("save_failures") == 2


def test_a_corrupt_chunk_on_a_read_only_disk_is_passed_over_each_time(tmp_path):
    disk = Disk(tmp_path, "bare")
    with disk.tier:
        fill(door(MODEL, disk.tier), IDS)
        flipped_payload(disk.files(door(MODEL, disk.tier)))
    with DiskTier(tmp_path / "store", read_only=True) as store:
        for _ in range(2):
            assert_fallback(door(MODEL, store), Reason.CORRUPT)


# Stores that fail


METHODS = ["head", "leading", "read", "write", "delete", "keys", "usage", "pin", "unpin", "quarantine"]
REASONS = {"leading": Reason.STORE_UNAVAILABLE, "read": Reason.STORE_UNAVAILABLE}


@pytest.mark.parametrize("error", [TierUnavailable("down"), TierTimeout("slow")], ids=["down", "slow"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_may_fail(method, error):
    inner = memory()
    fill(door(MODEL, inner), IDS)
    droid = door(MODEL, FaultyTier(inner, {method: repeat(fail(error))}))
    reason = REASONS.get(method)
    if reason is None:
        assert_exact(droid)
    elif method == "read" and isinstance(error, TierTimeout):
        assert_fallback(droid, Reason.TIMEOUT)
    else:
        assert_fallback(droid, reason)
    assert droid.connector.counters.get("lookup_failures") == (2 if method == "leading" else 0)


@pytest.mark.parametrize("calls", range(4))
def test_a_read_that_fails_halfway(calls):
    inner = memory()
    fill(door(MODEL, inner), IDS)
    store = FaultyTier(inner, {"read": [*repeat(None, calls), fail(TierUnavailable("down"))]})
    store.best_read = 1
    assert_fallback(door(MODEL, store), Reason.STORE_UNAVAILABLE)


def test_a_failing_tier_behind_a_sound_one():
    fast, slow = memory(), memory()
    fill(door(MODEL, fast), IDS)
    slow.name = "slow"
    store = TieredStore([fast, FaultyTier(slow, {"leading": repeat(fail(TierUnavailable("down")))})])
    assert_exact(door(MODEL, store))


# Slow stores


def test_a_store_that_is_too_slow_for_the_stream():
    inner = memory()
    fill(door(MODEL, inner), IDS)
    droid = door(MODEL, FaultyTier(inner, {"read": repeat(hang(0.3))}), load_deadline=0.05)
    started = time.monotonic()
    outcome = assert_fallback(droid, Reason.TIMEOUT)
    assert 0.03 <= outcome.wait_seconds < 1
    assert time.monotonic() - started < 2
    wait_for_loaders()


def wait_for_loaders() -> None:
    end = time.monotonic() + 5
    while any("droidspeak-load" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_tier_that_misses_its_deadline_when_reading():
    inner = memory()
    fill(door(MODEL, inner), IDS)
    slow = FaultyTier(inner, {"read": repeat(hang(1.0))})
    store = TieredStore([slow], limits={slow.name: Limits(read_deadline=0.05)})
    droid = door(MODEL, store)
    assert_fallback(droid, Reason.TIMEOUT)
    # The breaker skips the tier now: the next request does not wait again.
    started = time.monotonic()
    assert_fallback(droid, Reason.STORE_UNAVAILABLE)
    assert time.monotonic() - started < 0.8
    wait_for_loaders()


def test_a_tier_that_misses_its_deadline_when_asked():
    inner = memory()
    fill(door(MODEL, inner), IDS)
    slow = LatencyTier(inner, delay=0.3)
    store = TieredStore([slow], limits={slow.name: Limits(read_deadline=0.05)})
    assert_fallback(door(MODEL, store), Reason.STORE_UNAVAILABLE)


def test_a_slow_store_that_meets_its_deadline():
    inner = memory()
    fill(door(MODEL, inner), IDS)
    droid = door(MODEL, LatencyTier(inner, delay=0.01))
    assert_exact(droid)
    assert ask(droid, IDS)[1].wait_seconds > 0.005


def test_late_reads_never_touch_a_later_answer():
    """What a timed-out stream still reads lands in memory that nobody uses any more."""
    inner = memory()
    fill(door(MODEL, inner), IDS)
    droid = door(MODEL, FaultyTier(inner, {"read": [hang(0.2), hang(0.2)]}), load_deadline=0.05)
    assert_fallback(droid, Reason.TIMEOUT)
    prefix = droid.prefill(IDS)
    before = [(k.clone(), v.clone()) for k, v in prefix.layers]
    time.sleep(0.3)
    wait_for_loaders()
    for (k, v), (was_k, was_v) in zip(prefix.layers, before, strict=True):
        assert torch.equal(k, was_k)
        assert torch.equal(v, was_v)
