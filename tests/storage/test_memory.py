"""The memory tier: conformance, views, what is kept and what is copied, devices."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from droidspeak.errors import ConfigError, TierFull
from droidspeak.storage.container import Chunk, Slot, SlotKind
from droidspeak.storage.eviction import LRU, S3FIFO
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.testing import (
    TierConformance,
    TierStateMachine,
    assert_holds,
    make_chunk,
    make_key,
)
from droidspeak.storage.tier import Tier

MIB = 1 << 20
K0 = Slot(SlotKind.K, 0)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


class MemoryHooks:
    bounded = True
    damageable = False
    device = "cpu"

    def make_tier(self, place: Path, capacity: int | None = None) -> Tier:
        return MemoryTier(capacity or MIB, device=self.device)

    def get_bytes(self, tier: MemoryTier, key: ChunkKey) -> bytes | None:
        chunk = tier._chunks.get(key)
        if chunk is None:
            return None
        return Chunk(chunk.header, {slot: stored.cpu() for slot, stored in chunk.payload.items()}).to_bytes()

    def put_bytes(self, tier: MemoryTier, key: ChunkKey, data: bytes) -> None:
        tier._chunks[key] = Chunk.from_bytes(data, key)

    def drop(self, tier: MemoryTier, key: ChunkKey) -> None:
        with tier._lock:
            tier._remove(key)

    def cost(self, chunk: Chunk) -> int:
        return MemoryTier(MIB, device=self.device).footprint(chunk)


class TestMemoryTier(MemoryHooks, TierConformance):
    pass


class TestMemoryTierWithS3FIFO(MemoryHooks, TierConformance):
    def make_tier(self, place: Path, capacity: int | None = None) -> Tier:
        return MemoryTier(capacity or MIB, eviction=S3FIFO())


@needs_cuda
class TestMemoryTierOnCuda(MemoryHooks, TierConformance):
    device = "cuda"


class UnboundedMachine(MemoryHooks, TierStateMachine):
    pass


class LruMachine(MemoryHooks, TierStateMachine):
    capacity = 7_000


class S3FifoMachine(MemoryHooks, TierStateMachine):
    capacity = 7_000

    def make_tier(self, place: Path, capacity: int | None = None) -> Tier:
        return MemoryTier(capacity or MIB, eviction=S3FIFO())


TestUnboundedMachine = UnboundedMachine.TestCase
TestLruMachine = LruMachine.TestCase
TestS3FifoMachine = S3FifoMachine.TestCase
TestUnboundedMachine.settings = TestLruMachine.settings = TestS3FifoMachine.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None
)


def _addresses(chunk: Chunk | None) -> dict[Slot, int]:
    assert chunk is not None
    return {slot: stored.data_ptr() for slot, stored in chunk.payload.items()}


@pytest.fixture
def tier() -> MemoryTier:
    return MemoryTier(MIB)


def test_evicts_what_has_not_been_used_for_longest(tier: MemoryTier) -> None:
    for seed in range(3):
        tier.write(make_chunk(seed))
    tier.read(make_key(0))
    assert tier.evict(1) == tier.footprint(make_chunk(1))
    assert set(tier.keys()) == {make_key(0), make_key(2)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="pageable memory is copied into pinned memory")
def test_write_and_read_copy_nothing(tier: MemoryTier) -> None:
    chunk = make_chunk(1)
    tier.write(chunk)
    assert _addresses(tier.read(chunk.key)) == _addresses(chunk)
    assert _addresses(tier.read(chunk.key, [K0])) == {K0: chunk.payload[K0].data_ptr()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="pageable memory is copied into pinned memory")
def test_a_parsed_object_is_kept_in_its_one_piece(tier: MemoryTier) -> None:
    chunk = make_chunk(1)
    parsed = Chunk.from_bytes(chunk.to_bytes(), chunk.key)
    tier.write(parsed)
    assert _addresses(tier.read(chunk.key)) == _addresses(parsed)


def test_decoding_a_raw_slot_is_a_view(tier: MemoryTier) -> None:
    chunk = make_chunk(1)
    tier.write(chunk)
    got = tier.read(chunk.key)
    assert got is not None
    assert got.tensor(K0).data_ptr() == got.payload[K0].data_ptr()


def test_slices_of_a_larger_cache_are_copied_and_the_cache_is_let_go(tier: MemoryTier) -> None:
    cache = torch.randn(4, 64, 2, 4)
    watched = weakref.ref(cache.untyped_storage())
    tensors = {slot: cache[index, 16:32] for index, slot in enumerate(Slot.kv(range(2)))}
    chunk = Chunk.encode(make_key(1), tensors)
    expected = chunk.to_bytes()
    tier.write(chunk)
    del cache, tensors, chunk
    gc.collect()
    assert watched() is None
    got = tier.read(make_key(1))
    assert got is not None
    assert got.to_bytes() == expected


def test_holds_no_more_storage_than_it_accounts_for(tier: MemoryTier) -> None:
    for seed in range(5):
        arena = torch.randn(100, 2, 4)
        tier.write(Chunk.encode(make_key(seed), {K0: arena[seed : seed + 16 * (1 + seed)]}))
    chunks = [tier.read(make_key(seed)) for seed in range(5)]
    storages = {
        s.untyped_storage().data_ptr(): s.untyped_storage().nbytes()
        for chunk in chunks
        if chunk
        for s in chunk.payload.values()
    }
    assert sum(storages.values()) <= tier.usage().nbytes


def test_reads_are_uses_and_heads_are_not() -> None:
    tier = MemoryTier(3 * make_chunk(0).header.nbytes, eviction=LRU())
    if torch.cuda.is_available():
        pytest.skip("pinned memory is rounded up")
    for seed in range(3):
        tier.write(make_chunk(seed))
    tier.read(make_key(0))
    tier.head(make_key(1))
    tier.leading([make_key(1)])
    tier.write(make_chunk(3))
    assert tier.head(make_key(0))
    assert tier.head(make_key(1)) is None


def test_a_refused_chunk_evicts_nobody() -> None:
    tier = MemoryTier(3 * MemoryTier(MIB).footprint(make_chunk(0)))
    for seed in range(3):
        tier.write(make_chunk(seed))
    tier.pin(make_key(0))
    tier.pin(make_key(1))
    with pytest.raises(TierFull, match="pinned"):
        tier.write(make_chunk(7, e_layers=range(20)))
    assert len(list(tier.keys())) == 3


def test_room_that_is_pinned_during_the_copy_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = MemoryTier(MemoryTier(MIB).footprint(make_chunk(0)))
    tier.write(make_chunk(0))

    def pin_and_keep(_chunk: Chunk) -> bool:
        return tier.pin(make_key(0))

    monkeypatch.setattr(tier, "_may_keep", pin_and_keep)
    with pytest.raises(TierFull, match="pinned"):
        tier.write(make_chunk(1))
    assert_holds(tier.read(make_key(0)), make_chunk(0))


def test_an_allocation_that_fails_is_a_full_tier(tier: MemoryTier, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_args: object, **_options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.\nmore lines")

    monkeypatch.setattr(tier, "_may_keep", lambda chunk: False)
    monkeypatch.setattr(torch, "empty", no_memory)
    with pytest.raises(TierFull, match=r"^tier cpu: CUDA out of memory[^\n]*$"):
        tier.write(make_chunk(1))
    assert tier.usage().chunks == 0


def test_close_lets_go(tier: MemoryTier) -> None:
    chunk = make_chunk(1)
    watched = weakref.ref(chunk)
    tier.write(chunk)
    tier.pin(chunk.key)
    del chunk
    tier.close()
    gc.collect()
    assert watched() is None
    assert tier.usage().nbytes == 0


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_capacity_is_positive(capacity: int) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        MemoryTier(capacity)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_must_be_there(device: str) -> None:
    with pytest.raises(ConfigError, match=f"no device {device}"):
        MemoryTier(MIB, device=device)


def test_is_named_after_its_device(tier: MemoryTier) -> None:
    assert (tier.name, tier.device) == ("cpu", torch.device("cpu"))
    assert MemoryTier(MIB, name="ram").name == "ram"
    assert repr(tier) == "<MemoryTier cpu>"


@needs_cuda
def test_payload_lives_on_the_gpu() -> None:
    tier = MemoryTier(MIB, device="cuda")
    chunk = make_chunk(1)
    tier.write(chunk)
    got = tier.read(chunk.key, [K0])
    assert got is not None
    assert got.payload[K0].device == tier.device
    assert_holds(got, chunk, [K0])
    assert torch.equal(got.tensor(K0).cpu().view(torch.uint8), chunk.tensor(K0).view(torch.uint8))


@needs_cuda
def test_host_memory_is_pinned() -> None:
    tier = MemoryTier(MIB)
    tier.write(make_chunk(1))
    got = tier.read(make_key(1))
    assert got is not None
    assert all(stored.is_pinned() for stored in got.payload.values())
