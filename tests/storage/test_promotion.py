"""Promotion: what is copied where, what is not, and that it undoes nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from droidspeak.errors import ChunkCorrupt, TierFull, TierUnavailable
from droidspeak.storage.changes import Changes
from droidspeak.storage.container import Chunk, Slot
from droidspeak.storage.counters import Counters
from droidspeak.storage.guard import Limits
from droidspeak.storage.level import Level
from droidspeak.storage.memory import MemoryTier
from droidspeak.storage.promotion import Promoter
from droidspeak.storage.testing import assert_holds, make_chunk, make_key
from droidspeak.storage.tier import Tier
from droidspeak.storage.wrappers import FaultyTier, MeteredTier, fail

from .gates import GatedTier, eventually

MIB = 1 << 20
CHUNK = make_chunk(1)
KEY = CHUNK.key
SOME = Slot.kv([0])


class Ladder:
    """Three tiers, from fast to slow: memory, middle, slow. The slow one holds `CHUNK`."""

    def __init__(
        self, middle: Callable[[Tier], Tier] = MeteredTier, capacity: int = MIB, write_queue: int = MIB
    ) -> None:
        self.memory = MemoryTier(MIB, name="memory")
        self.shelf = MemoryTier(MIB, name="middle")
        self.slow = MeteredTier(GatedTier(MemoryTier(MIB, name="slow")))
        self.slow.tier.tier.write(CHUNK)
        self.counters, self.changes = Counters(), Changes()
        tiers = self.memory, GatedTier(middle(self.shelf)), self.slow
        self.levels = [Level(tier, Limits(), write_queue, self.counters) for tier in tiers]
        self.promoter = Promoter(self.levels, self.changes, self.counters, capacity)

    def offer(self, chunk: Chunk | None, *, level: int = 2, owned: bool = False) -> None:
        assert chunk is not None
        self.promoter.offer(level, chunk, self.changes.stamp(chunk.key), owned=owned)

    def settle(self) -> None:
        assert self.promoter.flush(10)
        assert all(level.flush(10) for level in self.levels)

    @property
    def slow_reads(self) -> int:
        stats = self.slow.snapshot().get("read")
        return stats.calls if stats else 0

    def close(self) -> None:
        self.promoter.close(10)
        for level in self.levels:
            level.close(10)


@pytest.fixture
def ladder() -> Iterator[Ladder]:
    ladder = Ladder()
    yield ladder
    ladder.close()


def test_a_whole_chunk_goes_into_all_faster_tiers_without_another_read(ladder: Ladder) -> None:
    ladder.offer(CHUNK)
    ladder.settle()
    assert_holds(ladder.memory.read(KEY), CHUNK)
    assert_holds(ladder.shelf.read(KEY), CHUNK)
    assert ladder.slow_reads == 0
    assert ladder.counters.snapshot()["promotions"] == {"memory": 1, "middle": 1}


def test_a_part_is_read_again_as_a_whole(ladder: Ladder) -> None:
    ladder.offer(ladder.levels[2].read(KEY, SOME))
    ladder.settle()
    assert ladder.slow_reads == 2
    assert_holds(ladder.memory.read(KEY), CHUNK)
    assert_holds(ladder.shelf.read(KEY), CHUNK)


def test_what_is_in_somebodys_memory_is_read_again(ladder: Ladder) -> None:
    mine = {slot: torch.zeros_like(stored) for slot, stored in CHUNK.payload.items()}
    ladder.offer(Chunk(CHUNK.header, mine), owned=True)
    ladder.settle()
    assert_holds(ladder.memory.read(KEY), CHUNK)


def test_only_into_tiers_that_lack_it(ladder: Ladder) -> None:
    ladder.memory.write(CHUNK)
    ladder.offer(ladder.levels[2].read(KEY, SOME))
    ladder.settle()
    assert ladder.counters.snapshot()["promotions"] == {"middle": 1}
    before = ladder.slow_reads
    ladder.offer(ladder.levels[2].read(KEY, SOME))
    ladder.settle()
    assert ladder.slow_reads == before + 1, "what is everywhere is not read again"


def test_replaces_a_chunk_that_has_less(ladder: Ladder) -> None:
    ladder.memory.write(make_chunk(2, key=KEY, e_layers=()))
    ladder.offer(CHUNK)
    ladder.settle()
    assert_holds(ladder.memory.read(KEY), CHUNK)


def test_from_the_middle_only_upwards(ladder: Ladder) -> None:
    ladder.shelf.write(CHUNK)
    ladder.offer(CHUNK, level=1)
    ladder.settle()
    assert ladder.counters.snapshot()["promotions"] == {"memory": 1}


def test_the_same_key_is_queued_once(ladder: Ladder) -> None:
    gated = ladder.slow.tier
    gated.operations = {"read"}
    ladder.offer(Chunk(CHUNK.header, {}))
    assert gated.entered.wait(10)
    for _ in range(5):
        ladder.offer(CHUNK)
    gated.gate.set()
    ladder.settle()
    assert ladder.counters.get("promotions", "memory") == 1


@pytest.mark.parametrize("whole", [True, False])
def test_a_write_is_never_undone(ladder: Ladder, whole: bool) -> None:
    newer = make_chunk(2, key=KEY)
    gated = ladder.slow.tier
    stamp = ladder.changes.stamp(KEY)
    if whole:
        ladder.memory.write(newer)
        with ladder.changes.turn(KEY):
            ladder.promoter.offer(2, CHUNK, stamp, owned=False)
        ladder.settle()
    else:
        gated.operations = {"read"}
        ladder.promoter.offer(2, Chunk(CHUNK.header, {}), stamp, owned=False)
        assert gated.entered.wait(10)
        with ladder.changes.turn(KEY):
            ladder.memory.write(newer)
        gated.gate.set()
        ladder.settle()
    assert_holds(ladder.memory.read(KEY), newer)
    assert ladder.counters.get("promotions") == 0


def test_a_promotion_waits_for_a_change_under_way(ladder: Ladder) -> None:
    with ladder.changes.turn(KEY):
        ladder.offer(CHUNK)
        time.sleep(0.05)
        assert ladder.memory.head(KEY) is None
    ladder.settle()
    assert ladder.memory.head(KEY) is None


def test_a_deleted_chunk_is_not_brought_back(ladder: Ladder) -> None:
    stamp = ladder.changes.stamp(KEY)
    with ladder.changes.turn(KEY):
        ladder.slow.delete(KEY)
        ladder.promoter.offer(2, CHUNK, stamp, owned=False)
    ladder.settle()
    assert ladder.memory.read(KEY) is None
    assert ladder.shelf.read(KEY) is None


def test_a_chunk_that_has_gone_meanwhile_is_forgotten(ladder: Ladder) -> None:
    ladder.slow.delete(KEY)
    ladder.offer(Chunk(CHUNK.header, {}))
    ladder.settle()
    assert ladder.counters.get("promotions") == 0


def test_a_corrupt_chunk_is_not_promoted(ladder: Ladder, caplog: pytest.LogCaptureFixture) -> None:
    faulty = FaultyTier(ladder.slow.tier, {"read": [fail(ChunkCorrupt("bad"))]})
    ladder.slow.tier = faulty
    ladder.offer(Chunk(CHUNK.header, {}))
    ladder.settle()
    assert ladder.counters.snapshot() == {"corrupt": {"slow": 1}}
    assert ladder.slow.head(KEY) is None
    assert "quarantined" in caplog.text


def test_a_tier_that_fails_is_passed_over() -> None:
    dead = fail(TierUnavailable("dead"))
    ladder = Ladder(lambda tier: FaultyTier(tier, {"leading": [dead], "head": [dead]}))
    ladder.offer(CHUNK)
    ladder.settle()
    assert_holds(ladder.memory.read(KEY), CHUNK)
    assert ladder.counters.snapshot()["promotions"] == {"memory": 1}
    ladder.close()


def test_a_tier_without_room_is_passed_over(ladder: Ladder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    small = MemoryTier(CHUNK.header.nbytes - 1, name="memory")
    with pytest.raises(TierFull):
        small.write(CHUNK)
    ladder.levels[0].tier.tier = small
    ladder.offer(CHUNK)
    ladder.settle()
    assert ladder.counters.snapshot() == {"promotions": {"middle": 1}}


def test_a_full_write_queue_is_not_waited_for() -> None:
    ladder = Ladder(write_queue=1)
    gated = ladder.levels[1].tier.tier
    gated.operations = {"write"}
    ladder.levels[1].write(make_chunk(2), 10)
    assert gated.entered.wait(10)
    ladder.offer(CHUNK)
    assert ladder.promoter.flush(4), "while the middle tier is still writing"
    assert ladder.counters.snapshot()["promotions"] == {"memory": 1}
    gated.gate.set()
    ladder.settle()
    assert set(ladder.shelf.keys()) == {make_key(2)}
    ladder.close()


def test_what_finds_the_queue_full_is_forgotten() -> None:
    ladder = Ladder(capacity=CHUNK.header.nbytes)
    gated = ladder.slow.tier
    gated.operations = {"read"}
    ladder.offer(Chunk(CHUNK.header, {}))
    assert gated.entered.wait(10)
    ladder.offer(make_chunk(2))
    gated.gate.set()
    ladder.settle()
    assert ladder.memory.head(make_key(2)) is None
    assert_holds(ladder.memory.read(KEY), CHUNK)
    ladder.close()


def test_closing_forgets_what_waits_and_outwaits_what_is_under_way(ladder: Ladder) -> None:
    gated = ladder.slow.tier
    gated.operations = {"read"}
    ladder.offer(Chunk(CHUNK.header, {}))
    assert gated.entered.wait(10)
    ladder.offer(make_chunk(2))
    ladder.promoter.close(0.05)
    gated.gate.set()
    assert eventually(lambda: ladder.memory.head(KEY) is not None)
    ladder.settle()
    assert ladder.memory.head(make_key(2)) is None
    ladder.offer(make_chunk(3))
    ladder.settle()
    assert ladder.memory.head(make_key(3)) is None
