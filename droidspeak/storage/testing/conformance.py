"""What every tier must do, as test methods."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import time_ns
from typing import ClassVar

import pytest
import torch

from droidspeak.errors import ChunkCorrupt, ChunkIncomplete, TierFull
from droidspeak.storage.container import Chunk, Slot, SlotKind
from droidspeak.storage.keys import ChunkKey
from droidspeak.storage.selection import Condition, Selection
from droidspeak.storage.testing.chunks import DTYPES, assert_holds, make_chunk, make_key
from droidspeak.storage.tier import ChunkInfo, Tier

__all__ = ["TierConformance"]


def _flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


_DAMAGES: dict[str, Callable[[bytes, int], bytes]] = {
    "nothing left": lambda _data, _start: b"",
    "length only": lambda data, _start: data[:8],
    "half a header": lambda data, start: data[: start // 2],
    "header only": lambda data, start: data[:start],
    "one byte short": lambda data, _start: data[:-1],
    "one byte long": lambda data, _start: data + b"\0",
    "first payload byte": _flip,
    "last payload byte": lambda data, _start: _flip(data, len(data) - 1),
    "not a chunk": lambda data, _start: b"\xff" * len(data),
    "another chunk": lambda _data, _start: make_chunk(999).to_bytes(),
}


def _read_unless_corrupt(tier: Tier, key: ChunkKey, slots: Collection[Slot] | None = None) -> Chunk | None:
    try:
        return tier.read(key, slots)
    except ChunkCorrupt:
        return None


class TierConformance:
    """What every tier must do. Subclass it as `Test...` and give the hooks.

    Attributes:
        persistent: `make_tier` over the same place finds what an earlier tier has written there.
        bounded: the tier keeps to `capacity`.
        damageable: what `put_bytes` stores is parsed and checked on read (not so for tiers that keep
            tensors, not bytes).
        reads_ranges: slots that are not asked for are not read.
        operations: per thread in the tests with threads; fewer for slow tiers.
    """

    persistent: ClassVar[bool] = False
    bounded: ClassVar[bool] = False
    damageable: ClassVar[bool] = True
    reads_ranges: ClassVar[bool] = False
    operations: ClassVar[int] = 60

    def make_tier(self, place: Path, capacity: int | None = None) -> Tier:
        """A tier on `place`, a folder of this test's own; `capacity` in bytes."""
        raise NotImplementedError

    def get_bytes(self, tier: Tier, key: ChunkKey) -> bytes | None:
        """The stored object, read without `tier`'s help."""
        raise NotImplementedError

    def put_bytes(self, tier: Tier, key: ChunkKey, data: bytes) -> None:
        """Replaces a stored object behind `tier`'s back."""
        raise NotImplementedError

    def drop(self, tier: Tier, key: ChunkKey) -> None:  # noqa: ARG002
        """Removes a stored object behind `tier`'s back. Optional."""
        pytest.skip("this tier cannot lose an object behind its back")

    def settle(self, tier: Tier) -> None:
        """Waits until what was written is where it stays. For tiers that write in the background."""

    def cost(self, chunk: Chunk) -> int:
        """Bytes that `chunk` takes of the tier's capacity."""
        return chunk.header.nbytes

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        with self.make_tier(tmp_path) as tier:
            yield tier

    @pytest.fixture
    def small_tier(self, tmp_path: Path) -> Iterator[Tier]:
        """A tier with room for three chunks of `make_chunk(seed)`."""
        if not self.bounded:
            pytest.skip("this tier sets no bound")
        with self.make_tier(tmp_path, 3 * self.cost(make_chunk(0))) as tier:
            yield tier

    # One chunk

    def test_what_was_never_written_is_a_miss(self, tier: Tier) -> None:
        key = make_key(0)
        assert tier.head(key) is None
        assert tier.read(key) is None
        assert tier.read(key, [Slot(SlotKind.K, 0)]) is None
        assert tier.leading([key]) == []
        assert list(tier.keys()) == []
        assert not tier.delete(key)
        assert not tier.pin(key)
        assert not tier.unpin(key)
        assert tier.usage().chunks == tier.usage().nbytes == 0
        tier.quarantine(key)

    @pytest.mark.parametrize("codec", ["raw", "zstd"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_reads_what_was_written(self, tier: Tier, dtype: torch.dtype, codec: str) -> None:
        chunk = make_chunk(1, dtype=dtype, codec=codec)
        tier.write(chunk)
        assert_holds(tier.read(chunk.key), chunk)
        assert tier.head(chunk.key) == ChunkInfo.of(chunk)

    def test_stores_the_container_as_it_is(self, tier: Tier) -> None:
        chunk = make_chunk(1)
        tier.write(chunk)
        assert self.get_bytes(tier, chunk.key) == chunk.to_bytes()
        assert self.get_bytes(tier, make_key(2)) is None

    def test_reads_what_was_put_behind_its_back(self, tier: Tier) -> None:
        old, new = make_chunk(1), make_chunk(2, key=make_key(1))
        tier.write(old)
        self.put_bytes(tier, old.key, new.to_bytes())
        assert_holds(tier.read(old.key), new)

    @pytest.mark.parametrize("codec", ["raw", "zstd"])
    def test_reads_exactly_the_slots_asked_for(self, tier: Tier, codec: str) -> None:
        chunk = make_chunk(1, layers=4, e_layers=(0, 2), codec=codec)
        tier.write(chunk)
        picks = [Slot(SlotKind.E, 2)], Slot.kv([1, 2]), Slot.kv([3, 0]), [*Slot.kv([3]), Slot(SlotKind.E, 0)]
        for slots in (*picks, [slot for slot in chunk.payload if slot.kind is SlotKind.V], []):
            assert_holds(tier.read(chunk.key, slots), chunk, slots)
            assert_holds(tier.read(chunk.key, list(reversed(slots))), chunk, slots)

    @pytest.mark.parametrize("codec", ["raw", "zstd"])
    def test_into_is_a_hint(self, tier: Tier, codec: str) -> None:
        chunk = make_chunk(1, codec=codec)
        tier.write(chunk)
        into = {slot: torch.zeros_like(chunk.tensor(slot)) for slot in chunk.payload}
        into[Slot(SlotKind.K, 0)] = torch.zeros(3, dtype=torch.float64)
        got = tier.read(chunk.key, into=into)
        assert_holds(got, chunk)
        assert not into.pop(Slot(SlotKind.K, 0)).any()
        for slot, out in into.items():
            assert got is not None
            got.tensor(slot, out)
            assert torch.equal(out.view(torch.uint8), chunk.tensor(slot).view(torch.uint8))

    def test_a_slot_that_was_not_stored_is_incomplete(self, tier: Tier) -> None:
        chunk = make_chunk(1)
        tier.write(chunk)
        for absent in (Slot(SlotKind.E, 0), Slot(SlotKind.K, 7)):
            with pytest.raises(ChunkIncomplete):
                tier.read(chunk.key, [Slot(SlotKind.K, 0), absent])
        assert_holds(tier.read(chunk.key), chunk)

    def test_a_part_of_a_chunk_is_not_written(self, tier: Tier) -> None:
        chunk = make_chunk(1)
        part = Chunk(chunk.header, {Slot(SlotKind.K, 0): chunk.payload[Slot(SlotKind.K, 0)]})
        with pytest.raises(ChunkIncomplete):
            tier.write(part)
        assert tier.read(chunk.key) is None

    def test_a_second_write_replaces(self, tier: Tier) -> None:
        key = make_key(1)
        versions = (1, (1,)), (2, (1,)), (3, (0, 1)), (4, ()), (1, (1,))
        for seed, e_layers in versions:
            chunk = make_chunk(seed, key=key, e_layers=e_layers)
            tier.write(chunk)
            assert_holds(tier.read(key), chunk)
            assert tier.head(key) == ChunkInfo.of(chunk)
            assert tier.usage().chunks == 1

    def test_sources_and_shards_are_apart(self, tier: Tier) -> None:
        keys = make_key(1), make_key(1, source=1), make_key(1, shard="0of2"), make_key(1, shard="1of2")
        chunks = [make_chunk(seed, key=key) for seed, key in enumerate(keys)]
        for chunk in chunks:
            tier.write(chunk)
        for chunk in chunks:
            assert_holds(tier.read(chunk.key), chunk)

    # Many chunks

    def test_leading_stops_at_the_first_gap(self, tier: Tier) -> None:
        chunks = [make_chunk(seed, layers=1) for seed in range(12)]
        for chunk in chunks[:5] + chunks[6:]:
            tier.write(chunk)
        keys = [chunk.key for chunk in chunks]
        assert tier.leading(keys) == [ChunkInfo.of(chunk) for chunk in chunks[:5]]
        assert tier.leading(keys[6:]) == [ChunkInfo.of(chunk) for chunk in chunks[6:]]
        assert tier.leading(keys[5:]) == tier.leading([]) == []

    def test_records_tell_of_every_chunk(self, tier: Tier) -> None:
        chunks = [make_chunk(seed, e_layers=range(seed % 3), salt=f"tenant {seed % 2}") for seed in range(5)]
        assert list(tier.records()) == []
        start = time_ns()
        for chunk in chunks:
            tier.write(chunk)
        self.settle(tier)
        tier.pin(chunks[0].key)
        found = {record.info.key: record for record in tier.records()}
        assert found.keys() == {chunk.key for chunk in chunks}
        for chunk in chunks:
            record = found[chunk.key]
            assert record.info == ChunkInfo.of(chunk)
            assert record.info.slots in (None, chunk.header.slot_bytes)
            assert record.info.tier
            # An object store's clock may be another one, and tell whole seconds.
            assert record.created is None or abs(record.created - start) < 3600 * 10**9
            assert record.used is None or record.created is None or record.used >= record.created
            assert record.pinned in (None, chunk is chunks[0])
            assert record.hits in (None, 0)

    def test_selecting_is_what_the_records_say(self, tier: Tier) -> None:
        for seed in range(12):
            tier.write(make_chunk(seed, layers=1 + seed % 4, e_layers=range(seed % 2), salt="s" * (seed % 2)))
        self.settle(tier)
        records = list(tier.records())
        for conditions in (
            (),
            (Condition("e", "=", 0),),
            (Condition("size", ">", records[0].info.nbytes), Condition("salt", "!=", "")),
            (Condition("source", "=", (records[0].info.key.source[:9],)),),
            (Condition("prefix", "!=", (records[0].info.key.prefix[:5],)),),
        ):
            for sort, descending, limit in ((None, False, None), ("size", True, 5), ("prefix", False, None)):
                selection = Selection(conditions, sort, descending, limit)
                keys = [record.info.key for record in tier.select(selection)]
                assert keys == [record.info.key for record in selection.of(records)] or sort is None
                assert sorted(keys) == sorted(record.info.key for record in selection.of(records))

    def test_sources_and_kinds_add_up(self, tier: Tier) -> None:
        chunks = [make_chunk(seed, key=make_key(seed, source=seed % 2), e_layers=(1,)) for seed in range(5)]
        for chunk in chunks:
            tier.write(chunk)
        self.settle(tier)
        records = list(tier.records())
        told = {source: (usage.chunks, usage.nbytes) for source, usage in tier.sources().items()}
        kinds = tier.slot_bytes()
        assert len(told) == 2
        for source, sums in told.items():
            infos = [record.info for record in records if record.info.key.source == source]
            assert sums == (len(infos), sum(info.nbytes for info in infos))
            known = [info.slots for info in infos if info.slots]
            assert list(kinds[source]) == [sum(column) for column in zip(*known, strict=True)]
        assert sum(usage.nbytes for usage in tier.by_tier().values()) == tier.usage().nbytes

    def test_keys_usage_and_delete(self, tier: Tier) -> None:
        chunks = [make_chunk(seed, e_layers=range(seed % 3)) for seed in range(5)]
        for count, chunk in enumerate(chunks, 1):
            tier.write(chunk)
            assert set(tier.keys()) == {c.key for c in chunks[:count]}
            assert tier.usage().chunks == count
            assert tier.usage().nbytes == sum(self.cost(c) for c in chunks[:count])
        for chunk in chunks:
            assert tier.delete(chunk.key)
            assert not tier.delete(chunk.key)
            assert tier.read(chunk.key) is None
        assert list(tier.keys()) == []
        assert tier.usage().nbytes == 0

    def test_what_was_replaced_since_it_was_listed_stays(self, tier: Tier) -> None:
        for seed in range(4):
            tier.write(make_chunk(seed))
        listed = list(tier.records())
        tier.delete(make_key(0))
        tier.write(make_chunk(1, layers=3))
        left = {record.info.key for record in tier.delete_unused(listed)}
        assert left == {make_key(2), make_key(3)}
        assert list(tier.keys()) == [make_key(1)]

    def test_a_pinned_chunk_can_be_deleted(self, tier: Tier) -> None:
        chunk = make_chunk(1)
        tier.write(chunk)
        assert tier.pin(chunk.key)
        assert tier.pin(chunk.key)
        assert tier.delete(chunk.key)
        assert tier.head(chunk.key) is None
        assert not tier.unpin(chunk.key)

    # Damage

    @pytest.mark.parametrize("codec", ["raw", "zstd"])
    @pytest.mark.parametrize("damage", _DAMAGES)
    def test_damage_is_corrupt_or_a_miss(self, tier: Tier, damage: str, codec: str) -> None:
        self._needs_damageable()
        chunk = make_chunk(1, codec=codec)
        tier.write(chunk)
        self.put_bytes(tier, chunk.key, _DAMAGES[damage](chunk.to_bytes(), chunk.header.data_start))
        assert _read_unless_corrupt(tier, chunk.key) is None
        tier.quarantine(chunk.key)
        assert tier.head(chunk.key) is None
        assert tier.read(chunk.key) is None
        assert chunk.key not in set(tier.keys())
        tier.write(chunk)
        assert_holds(tier.read(chunk.key), chunk)

    def test_a_damaged_header_never_gives_wrong_bytes(self, tier: Tier) -> None:
        self._needs_damageable()
        chunk = make_chunk(1)
        tier.write(chunk)
        for position in range(0, chunk.header.data_start, 41):
            self.put_bytes(tier, chunk.key, _flip(chunk.to_bytes(), position))
            if got := _read_unless_corrupt(tier, chunk.key):  # a header from a cache is right
                assert_holds(got, chunk)
            tier.write(chunk)

    def test_damage_in_a_slot_not_asked_for_does_not_matter(self, tier: Tier) -> None:
        if not self.reads_ranges:
            pytest.skip("this tier reads whole objects")
        chunk = make_chunk(1)
        tier.write(chunk)
        self.put_bytes(tier, chunk.key, _flip(chunk.to_bytes(), chunk.header.nbytes - 1))
        assert_holds(tier.read(chunk.key, Slot.kv([0])), chunk, Slot.kv([0]))
        assert _read_unless_corrupt(tier, chunk.key, Slot.kv([1])) is None

    def test_an_object_lost_behind_its_back_is_a_miss(self, tier: Tier) -> None:
        chunks = [make_chunk(seed) for seed in range(3)]
        for chunk in chunks:
            tier.write(chunk)
        assert_holds(tier.read(chunks[1].key), chunks[1])
        self.drop(tier, chunks[1].key)
        assert tier.read(chunks[1].key) is None
        assert tier.head(chunks[1].key) is None
        assert len(tier.leading([chunk.key for chunk in chunks])) == 1
        tier.write(chunks[1])
        assert_holds(tier.read(chunks[1].key), chunks[1])

    def _needs_damageable(self) -> None:
        if not self.damageable:
            pytest.skip("this tier keeps tensors, not bytes")

    # Room

    def test_never_holds_more_than_its_capacity(self, small_tier: Tier) -> None:
        capacity = 3 * self.cost(make_chunk(0))
        assert small_tier.usage().capacity == capacity
        for seed in range(20):
            chunk = make_chunk(seed, e_layers=range(seed % 3))
            small_tier.write(chunk)
            assert_holds(small_tier.read(chunk.key), chunk)
            assert 0 < small_tier.usage().nbytes <= capacity
            assert small_tier.usage().chunks == len(list(small_tier.keys()))

    def test_the_pinned_stay_and_the_unpinned_make_room(self, small_tier: Tier) -> None:
        chunks = [make_chunk(seed) for seed in range(3)]
        for chunk in chunks:
            small_tier.write(chunk)
            assert small_tier.pin(chunk.key)
        with pytest.raises(TierFull):
            small_tier.write(make_chunk(3))
        for chunk in chunks:
            assert_holds(small_tier.read(chunk.key), chunk)
        assert small_tier.unpin(chunks[1].key)
        for seed in range(3, 9):
            small_tier.write(make_chunk(seed))
            assert small_tier.head(chunks[1].key) is None
        assert_holds(small_tier.read(chunks[0].key), chunks[0])
        assert_holds(small_tier.read(chunks[2].key), chunks[2])

    def test_a_pin_survives_a_second_write(self, small_tier: Tier) -> None:
        for seed in range(3):
            small_tier.write(make_chunk(seed))
            small_tier.pin(make_key(seed))
        again = make_chunk(9, key=make_key(0))
        small_tier.write(again)
        with pytest.raises(TierFull):
            small_tier.write(make_chunk(3))
        assert_holds(small_tier.read(again.key), again)

    def test_what_can_never_fit_is_refused_and_nothing_is_lost(self, small_tier: Tier) -> None:
        chunks = [make_chunk(seed) for seed in range(3)]
        for chunk in chunks:
            small_tier.write(chunk)
        for key in (make_key(3), chunks[0].key):
            with pytest.raises(TierFull):
                small_tier.write(make_chunk(3, key=key, tokens=256))
        for chunk in chunks:
            assert_holds(small_tier.read(chunk.key), chunk)

    def test_evicting_frees_what_was_asked_and_never_the_pinned(self, small_tier: Tier) -> None:
        chunks = [make_chunk(seed) for seed in range(3)]
        for chunk in chunks:
            small_tier.write(chunk)
        assert small_tier.pin(chunks[0].key)
        asked = self.cost(chunks[0])
        for ask, left in ((0, 3), (asked, 2), (1, 1), (asked, 1), (1 << 60, 1)):
            before = small_tier.usage().nbytes
            freed = small_tier.evict(ask)
            usage = small_tier.usage()
            assert freed == before - usage.nbytes
            assert usage.chunks == len(list(small_tier.keys())) == left
            assert freed >= ask or left == 1
        assert_holds(small_tier.read(chunks[0].key), chunks[0])
        assert [small_tier.read(chunk.key) for chunk in chunks[1:]] == [None, None]
        assert small_tier.unpin(chunks[0].key)
        assert small_tier.evict(1) == asked
        assert small_tier.usage().chunks == small_tier.usage().nbytes == small_tier.evict(1) == 0

    def test_evicting_frees_as_much_as_it_says(self, tier: Tier) -> None:
        chunks = {make_key(seed): make_chunk(seed) for seed in range(3)}
        for chunk in chunks.values():
            tier.write(chunk)
        before = tier.usage().nbytes
        assert tier.evict(0) == 0
        assert tier.evict(1) == before - tier.usage().nbytes
        for key in list(tier.keys()):
            assert_holds(tier.read(key), chunks[key])

    # Life

    def test_closes_twice(self, tier: Tier) -> None:
        tier.write(make_chunk(1))
        tier.close()
        tier.close()

    def test_reopening_finds_everything(self, tmp_path: Path) -> None:
        if not self.persistent:
            pytest.skip("this tier forgets")
        chunks = [make_chunk(seed, codec=codec) for seed, codec in enumerate(("raw", "zstd", "raw"))]
        with self.make_tier(tmp_path) as tier:
            for chunk in chunks:
                tier.write(chunk)
            usage = tier.usage()
        with self.make_tier(tmp_path) as tier:
            assert tier.usage() == usage
            assert tier.leading([chunk.key for chunk in chunks]) == [ChunkInfo.of(chunk) for chunk in chunks]
            for chunk in chunks:
                assert_holds(tier.read(chunk.key), chunk)

    def test_pins_survive_reopening(self, tmp_path: Path) -> None:
        if not (self.persistent and self.bounded):
            pytest.skip("this tier forgets, or never evicts")
        capacity = 3 * self.cost(make_chunk(0))
        with self.make_tier(tmp_path, capacity) as tier:
            tier.write(make_chunk(0))
            tier.pin(make_key(0))
        with self.make_tier(tmp_path, capacity) as tier:
            for seed in range(1, 9):
                tier.write(make_chunk(seed))
            assert_holds(tier.read(make_key(0)), make_chunk(0))

    def test_many_threads_never_see_a_mixture(self, tier: Tier) -> None:
        self._storm(tier)
        assert tier.usage().chunks == len(list(tier.keys()))

    def test_many_threads_in_little_room(self, small_tier: Tier) -> None:
        self._storm(small_tier)
        usage = small_tier.usage()
        assert usage.nbytes <= (usage.capacity or 0)
        assert usage.chunks == len(list(small_tier.keys()))

    def _storm(self, tier: Tier) -> None:
        """Threads write two versions of a few chunks, read and delete them."""
        versions = {
            make_key(seed): [make_chunk(seed), make_chunk(seed + 100, key=make_key(seed), e_layers=())]
            for seed in range(5)
        }

        def work(seed: int) -> None:
            source = random.Random(seed)
            for _ in range(self.operations):
                key = source.choice(list(versions))
                step = source.random()
                if step < 0.3:
                    tier.write(source.choice(versions[key]))
                elif step < 0.4:
                    tier.delete(key)
                elif step < 0.5:
                    tier.head(key)
                elif got := tier.read(key, None if step < 0.8 else Slot.kv([1])):
                    assert_holds(got, versions[key][not got.header.e_layers], got.payload)

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(work, seed) for seed in range(8)]:
                done.result()
